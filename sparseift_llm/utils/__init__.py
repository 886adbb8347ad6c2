"""Files written whole or not at all, and files of JSON lines. Knows nothing of models."""
