"""Where a model's files are: a local folder, or a hub id whose safetensors and JSON files are fetched."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from specserve.core.errors import ModelLoadError


def resolve_folder(name_or_path: str) -> Path:
    """The model's folder; a hub id is downloaded to huggingface_hub's cache (HF_HUB_OFFLINE is honoured).

    Raises ModelLoadError when there is neither a readable folder nor such a repository.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or name_or_path.startswith((".", "~")):
        raise ModelLoadError(f"Model {name_or_path!r} is not a folder.")
    try:
        # Only what is read: no pickled weights, no code. Some repositories hold a second copy as consolidated.*.
        return Path(
            snapshot_download(
                name_or_path, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["consolidated*", "*/*"]
            )
        )
    except HFValidationError:
        raise ModelLoadError(f"Model {name_or_path!r} is neither a folder nor a hub id.") from None
    except LocalEntryNotFoundError:
        raise ModelLoadError(
            f"Model {name_or_path!r} is not a folder, and the hub cannot be reached nor its cache holds it."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(f"Model {name_or_path!r} cannot be fetched from the hub: {reason}") from error
