"""The version of every record; a reader refuses a newer one."""

from __future__ import annotations

SCHEMA = 1
