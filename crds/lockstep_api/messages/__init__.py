"""Messages between operator, leader and members.

Frozen dataclasses, so that protocol cores can use them without I/O libraries; ``lockstep_api.wire`` turns them into
JSON and back and refuses what does not fit. Each message names the job, epoch and generation it belongs to:
receivers compare (epoch, generation) first and drop what is older (docs/design/membership.md, (a)).

Directions::

    operator ── Membership, Stop, FaultAck ──────────► leader
    operator ◄─ Inventory, Progress, FaultReport, Recovered, ReplaceRequest, EpochRequest, Finished ── leader
    leader   ── Invite, Start, Abandon, Kept, Void, Upload, TakeSnapshot, Committed, Examine, Beat, Release ─► member
    leader   ◄─ Join, Quiesced, Steps, WorkerExited, Staged, Uploaded, UploadProblem, Leaving, Examined, Injected, Beat
                ── member
"""

from __future__ import annotations

from lockstep_api.messages.checkpoints import (
    Committed,
    Kept,
    Staged,
    TakeSnapshot,
    Upload,
    Uploaded,
    UploadProblem,
    Void,
)
from lockstep_api.messages.generations import Abandon, Quiesced, Start, Steps, WorkerExited
from lockstep_api.messages.hangs import Examine, Examined, GroupCalls, Position
from lockstep_api.messages.injections import Injected
from lockstep_api.messages.membership import (
    Beat,
    EpochRequest,
    Inventory,
    Invite,
    Join,
    Leaving,
    Membership,
    Release,
    ReplaceRequest,
)
from lockstep_api.messages.parts import (
    Aside,
    Copies,
    CorruptVerdict,
    Cut,
    Descent,
    Dispute,
    Doubt,
    Injection,
    MemoryPoint,
    Origin,
    OutlierVerdict,
    RankWork,
    Rendezvous,
    RestorePoint,
    SlotInfo,
    SlowVerdict,
    StateId,
    StepSummary,
    StoredFile,
    Term,
)
from lockstep_api.messages.reports import FaultAck, FaultReport, Finished, Progress, Recovered, Stop

ToLeader = (
    Join | Quiesced | Steps | WorkerExited | Staged | Uploaded | UploadProblem | Leaving | Examined | Injected | Beat
)
ToMember = Start | Abandon | Kept | Void | Upload | TakeSnapshot | Committed | Examine | Beat | Release
FromOperator = Membership | Stop | FaultAck
ToOperator = Inventory | Progress | FaultReport | Recovered | ReplaceRequest | EpochRequest | Finished
Message = ToLeader | ToMember | FromOperator | ToOperator | Invite

__all__ = [
    "Abandon",
    "Aside",
    "Beat",
    "Committed",
    "Copies",
    "CorruptVerdict",
    "Cut",
    "Descent",
    "Dispute",
    "Doubt",
    "EpochRequest",
    "Examine",
    "Examined",
    "FaultAck",
    "FaultReport",
    "Finished",
    "FromOperator",
    "GroupCalls",
    "Injected",
    "Injection",
    "Inventory",
    "Invite",
    "Join",
    "Kept",
    "Leaving",
    "Membership",
    "MemoryPoint",
    "Message",
    "Origin",
    "OutlierVerdict",
    "Position",
    "Progress",
    "Quiesced",
    "RankWork",
    "Recovered",
    "Release",
    "Rendezvous",
    "ReplaceRequest",
    "RestorePoint",
    "SlotInfo",
    "SlowVerdict",
    "Staged",
    "Start",
    "StateId",
    "StepSummary",
    "Steps",
    "Stop",
    "StoredFile",
    "TakeSnapshot",
    "Term",
    "ToLeader",
    "ToMember",
    "ToOperator",
    "Upload",
    "UploadProblem",
    "Uploaded",
    "Void",
    "WorkerExited",
]
