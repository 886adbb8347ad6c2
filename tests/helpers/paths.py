"""Where the project's files are, for tests. No tests stand here."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
