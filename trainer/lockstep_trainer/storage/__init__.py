"""Object stores: S3 and folders behind one small interface."""

from __future__ import annotations

from lockstep_trainer.storage.store import Entry, ObjectStore, open_store, put_once

__all__ = ["Entry", "ObjectStore", "open_store", "put_once"]
