"""How a run ends: its exit status, and what is saved on the way out.

with checked(group):                # faults of the input: `WrongInput` on all ranks
    ...
status = leave(run, error)          # of a `run.Run` that an error ended
"""

import contextlib
import sys
import traceback

import data
from runtime import checkpoint, device_memory, distributed
from runtime.signals import CannotGoOn, Stopped
from volumes.processes import command_of

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75
ENDS = (Stopped, CannotGoOn, data.TooManyExcluded)  # errors with which a run ends in good order


class WrongInput(ValueError):
    """What a person must change before a run can begin: one sentence a line."""

    status = WRONG_INPUT


@contextlib.contextmanager
def checked(group):
    """In this context a ValueError or a missing file is the input's fault: `WrongInput`.

    It is raised on all ranks of a `distributed.Group`, if any of them finds a fault.
    """
    fault = None
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        fault = str(error)
    faults = group.gather(fault)
    if len(set(faults)) > 1:
        named = enumerate(faults)
        faults = [f"rank {r} on {group.people[r][0]}: {text}" for r, text in named if text]
    if faults[0] is not None:
        raise WrongInput("\n".join(dict.fromkeys(faults)))


def leave(run, error):
    """The exit status of a run that this error ended; the state of its last step is saved.

    `Stopped` is 75, what a run cannot get over is 1; of anything else the traceback is recorded
    and it is raised again. The other ranks are told, and leave too; rank 0 saves.
    """
    own = not isinstance(error, distributed.Left)
    to_say = not own and error.to_say
    if not own:
        error = (Stopped if error.status == STOPPED else CannotGoOn)(str(error))
    status = STOPPED if isinstance(error, Stopped) else FAILED
    rank = f"rank {run.group.rank}: " * (own and not run.group.first)
    name = f"{type(error).__name__}: " * (not isinstance(error, ENDS))
    run.group.leave(f"{rank}{name}{error}".rstrip(": "), status)
    if not run.group.first:
        if own and name:
            raise error
        if to_say:
            print(f"{error}; {_how_to_go_on(run)}", file=sys.stderr, flush=True)
        return status
    if isinstance(error, OSError) and checkpoint.no_room(error):
        return _leave_full_disk(run, error)
    if isinstance(error, MemoryError) or device_memory.out_of_memory(error):
        _record_crash(run, error)  # the lines say where
        reason = device_memory.first_line(error) or "MemoryError"
        return _leave_as_saved(
            run,
            f"memory ran out where no step can be made smaller ({reason}); lower model.base or "
            "data.cache_gb, or end what else runs there",
        )
    if not isinstance(error, ENDS):
        _record_crash(run, error)
        raise error
    try:
        if not run.saved:
            run.save()
        run.record_saved(wait=True)
        run.record("stop", reason=str(error), status=status)
    except OSError as disk:
        return _leave_full_disk(run, disk)
    _say_stopped(run, f"{error}; the state of step {run.step} is saved", status)
    return status


def _leave_full_disk(run, error):
    return _leave_as_saved(run, f"the disk does not take what the run writes ({error})")


def _leave_as_saved(run, text):
    """Leave with the state that is on the disk, for no other can be saved."""
    run.saver.close()
    step = run.saver.on_disk
    text += "; no state is kept" if step is None else f"; the state of step {step} is kept"
    with contextlib.suppress(OSError):  # the text says so itself
        run.record("stop", reason=text, status=FAILED)
    _say_stopped(run, text, FAILED)
    return FAILED


def _record_crash(run, error):
    with contextlib.suppress(OSError):  # the error itself is what counts
        text = "".join(traceback.format_exception(error))
        run.record("crash", error=f"{type(error).__name__}: {error}", traceback=text)


def _say_stopped(run, text, status):
    where = run.folder / "checkpoints"
    text = f"stopped at step {run.step}: {text} in {where}; {_how_to_go_on(run)}"
    if status == FAILED:
        print(text, file=sys.stderr, flush=True)
    else:
        run.show.print(text)


def _how_to_go_on(run):
    alone = f"with: {command_of('train.py')}" if run.group.size == 1 else "with as many ranks and"
    return f"go on {alone} --resume {run.folder}"
