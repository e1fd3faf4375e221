"""The bundled models; MODEL_CARD.md says what they are."""
