"""Where the objects of a commit lie, and which of them retention removed.

Kept beside the commit in an object of its own, `_objects-<sha256 of the commit>.json`, so that the commit's bytes
depend on neither. Without that object all is in the stage's folder.
"""

import json
from datetime import datetime

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from moe_replay.archive.commits import canonical_json
from moe_replay.archive.layout import STAGES, attempted_stage, check_object_path, placement_file, superseded_stage
from moe_replay.archive.storage import Storage
from moe_replay.errors import ArchiveCorrupt


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expiry(_Record):
    """Objects of one artifact that retention removed; its commit, and so what was made from it, stays."""

    below: str
    """Folder in the artifact whose objects were removed; empty for all objects."""
    why: str
    """The rule that asked for it."""
    on: datetime

    @field_validator("below")
    @classmethod
    def _inside_artifact(cls, below: str) -> str:
        return below and check_object_path(below)


class Placement(_Record):
    """Where the objects of one commit are."""

    folder: str | None = None
    """Name, beside the stage's folder, of the folder that holds them; none when the stage's folder does.

    That is an attempt's, or of something superseded the stage's own.
    """
    expiry: Expiry | None = None

    @field_validator("folder")
    @classmethod
    def _attempts_folder(cls, folder: str | None) -> str | None:
        if folder is not None and folder not in STAGES and attempted_stage(folder) is None:
            raise ValueError(f"{folder[:80]!r} is no attempt's folder")
        return folder

    def _require_of(self, own: str) -> None:
        """Raise ValueError when objects of the folder `own` are said to lie in a stage's that is not its own."""
        if self.folder in STAGES and self.folder != superseded_stage(own):
            raise ValueError(f"{self.folder!r} is no folder for objects of {own[:80]!r}")

    @classmethod
    def read(cls, stage: Storage, sha256: str) -> "Placement":
        """Where the objects of the commit `sha256` in the folder `stage` lie; raises ArchiveCorrupt if unreadable.

        Nothing vouches for it: objects are checked against the commit wherever they are said to be.
        """
        name = placement_file(sha256)
        try:
            data = stage.read(name)
        except FileNotFoundError:
            return cls()
        # Apart from the reading, whose own errors are ValueErrors too.
        try:
            placement = cls.model_validate(json.loads(data))
            placement._require_of(stage.name.rpartition("/")[2])
            return placement
        except (ValidationError, ValueError) as error:
            raise ArchiveCorrupt(
                f"object {stage.name}/{name} says nothing readable of where the objects of the commit lie; restore it, "
                "or delete the stage's folder and resume the run to make it again"
            ) from error

    def write(self, stage: Storage, sha256: str) -> None:
        """Say of the commit `sha256` in the folder `stage` that its objects lie here."""
        stage.write(placement_file(sha256), canonical_json(self.model_dump(mode="json")))

    def objects_of(self, stage: Storage) -> Storage:
        """The folder of the objects, where `stage` is the stage's folder."""
        return stage if self.folder is None else stage.beside(self.folder)

    def lacks(self, path: str) -> bool:
        """Whether retention removed the object `path`."""
        below = self.expiry and self.expiry.below
        return below is not None and (not below or path.startswith(f"{below}/"))
