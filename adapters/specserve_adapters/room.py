"""Whether requests and pins fit the device slots together. Asked before anything is changed."""

from __future__ import annotations

import logging

from specserve.core.errors import AdapterBusyError, InvalidRequestError
from specserve_adapters.catalogue import Catalogue
from specserve_adapters.entry import Entry, LoadTicket, NameRecord
from specserve_adapters.live import LiveUses, Uses

_log = logging.getLogger(__name__)


def check_request(uses: Uses, names: Catalogue, num_slots: int) -> None:
    """Raise unless the adapters of one request fit the slots beside the pinned ones."""
    entries = {use.entry for use in uses}
    if len(entries) > num_slots:
        raise InvalidRequestError(
            f"lora: {len(entries)} adapters in one request; the device has {num_slots} slots (--max-loras).",
            param="lora",
        )
    if entries and len(names.pins() | entries) > num_slots:
        raise AdapterBusyError(
            f"lora: pinned adapters leave too few of the {num_slots} device slots; unpin some.", param="lora"
        )


def check_pin(
    record: NameRecord | None, pin: Entry | LoadTicket, names: Catalogue, live: LiveUses, num_slots: int
) -> None:
    """Raise unless every live request could still get its slots if `pin` became the pinned version of `record`."""
    if not live.fit(num_slots, names.pins(without=record) | {pin}):
        raise AdapterBusyError(
            f"Too few of the {num_slots} device slots would be left for others; unpin another adapter.", param="pinned"
        )


def pin_name(record: NameRecord, names: Catalogue, num_slots: int) -> None:
    """Pin a name that `check_pin` let pass, and warn when it takes the last slot that others could use: from then on
    `check_request` refuses them, and whoever pinned may not know.
    """
    if record.pinned:
        return
    names.pin(record, True)
    if len(names.pins()) >= num_slots:
        _log.warning(
            "%d of %d device slots are pinned, the last one for adapter %r: requests with any other are refused. "
            "Unpin one (specserve adapters unpin NAME) or start with a larger --max-loras.",
            len(names.pins()), num_slots, record.name,
        )  # fmt: skip
