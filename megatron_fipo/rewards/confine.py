"""What a verifier's process may do: the kernel's limits, set in the forked process before any verifier runs in it.

Against verifiers that misbehave on odd text, not against an attacker: nothing here hides files from them.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from functools import cache
from pathlib import Path

MEMORY_BYTES = 2 << 30
"""Address space beyond what the process had when it was forked."""
FILE_BYTES = 16 << 20
OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in seccomp_data
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

# AUDIT_ARCH_*, then the system calls that start processes, open sockets, reach other processes or raise limits.
# clone, clone3 and prlimit64 have harmless uses and are looked at more closely.
_DENIED = (
    "execve execveat fork kill pidfd_send_signal process_vm_writev ptrace rt_sigqueueinfo setrlimit tgkill tkill vfork"
)
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        dict(clone=56, clone3=435, execve=59, execveat=322, fork=57, io_uring_setup=425, kill=62, prlimit64=302,
             pidfd_send_signal=424, process_vm_writev=311, ptrace=101, rt_sigqueueinfo=129, setrlimit=160, socket=41,
             tgkill=234, tkill=200, vfork=58),
    ),
    "aarch64": (
        0xC00000B7,
        dict(clone=220, clone3=435, execve=221, execveat=281, io_uring_setup=425, kill=129, prlimit64=261,
             pidfd_send_signal=424, process_vm_writev=271, ptrace=117, rt_sigqueueinfo=138, setrlimit=164, socket=198,
             tgkill=131, tkill=130),
    ),
}  # fmt: skip


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ``parent`` ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def limit_resources() -> None:
    """Bound memory, open files and file size, and forbid core dumps, for good."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, own + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def deny_processes(*, network: bool) -> None:
    """Refuse new processes, signals to others and, without ``network``, sockets (EPERM). Threads stay possible.

    Raises:
        OSError: the kernel has no system-call filter, or the machine is neither x86_64 nor aarch64.
    """
    program = _filter(network)
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(fprog, len(fprog)))


@cache
def available() -> bool:
    """Does this kernel filter system calls? Tried in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            deny_processes(network=False)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _filter(network: bool) -> bytes:
    """A seccomp program; each test below is followed by the return that it guards."""
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system-call filter for {platform.machine()}")
    architecture, number = _MACHINES[platform.machine()]

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    def refuse(error: int) -> bytes:
        return op(_RETURN, _ERRNO | error)

    load = op(_LOAD, _NUMBER)
    program = op(_LOAD, _ARCHITECTURE) + op(_EQUAL, architecture, if_true=1) + refuse(errno.EPERM)
    program += load + op(_AT_LEAST, _X32, if_false=1) + refuse(errno.EPERM)
    for name in _DENIED.split() + ([] if network else ["socket", "io_uring_setup"]):
        if name in number:  # aarch64 has no fork and vfork
            program += op(_EQUAL, number[name], if_false=1) + refuse(errno.EPERM)
    program += op(_EQUAL, number["clone3"], if_false=1) + refuse(errno.ENOSYS)  # the C library falls back to clone
    program += op(_EQUAL, number["clone"], if_false=4) + op(_LOAD, _ARGUMENTS)
    program += op(_ANY_BIT, _CLONE_THREAD, if_true=1) + refuse(errno.EPERM) + op(_RETURN, _ALLOW)
    program += op(_EQUAL, number["prlimit64"], if_false=3) + op(_LOAD, _ARGUMENTS + 2 * 8)  # its new limit, if any
    program += op(_EQUAL, 0, if_true=1) + refuse(errno.EPERM)
    return program + op(_RETURN, _ALLOW)


def _prctl(option: int, *arguments: object) -> None:
    padded = [*arguments, *[0] * (4 - len(arguments))]
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]
    if ctypes.CDLL(None, use_errno=True).prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")
