"""Object stores: S3 and folders behind one small interface."""

from __future__ import annotations

from lockstep_trainer.storage.store import Entry, Head, ObjectStore, Unfinished, open_store, put_once

__all__ = ["Entry", "Head", "ObjectStore", "Unfinished", "open_store", "put_once"]
