"""Shows the package another system, in processes that have this folder on PYTHONPATH and SIMULATED_SYSTEM set.

Python imports this file when it starts. Only the package's own modules see the other system: what they import is `os`,
`signal` and `sys` without the names that the system lacks. JAX and Python's own libraries stay those of Linux. What
Windows refuses for an open file is refused to everybody.
"""

import builtins
import os
import signal
import sys
from types import ModuleType

MISSING_MODULES = {
    "win32": {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"},
    "darwin": set(),
}
MISSING_OS = {
    "win32": """O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC O_TMPFILE PRIO_PROCESS chown confstr fchdir
    fchmod fchown fdatasync fork forkpty fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp
    getpriority getsid getuid killpg lchown lockf mkfifo mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate
    posix_spawn pread preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield
    sendfile setpriority setsid setuid statvfs sync sysconf ttyname uname wait wait3 wait4 waitid writev""",
    "darwin": "O_TMPFILE fdatasync memfd_create posix_fadvise posix_fallocate sched_getaffinity sched_setaffinity",
}
WINDOWS_SIGNALS = """NSIG SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN Handlers Signals
default_int_handler getsignal raise_signal set_wakeup_fd signal strsignal valid_signals"""


class Partial(ModuleType):
    """A module without some of its names, and with others in their place."""

    def __init__(self, module, hidden, **others):
        super().__init__(module.__name__)
        for name, value in {"_module": module, "_hidden": frozenset(hidden), **others}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name):
        if name in self._hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)


def simulate(system):
    """Replaces what modules of the package import from now on."""
    modules = {"os": Partial(os, MISSING_OS[system].split()), "sys": Partial(sys, (), platform=system)}
    if system == "win32":
        hidden = {name for name in dir(signal) if name not in WINDOWS_SIGNALS.split()}
        modules["signal"] = Partial(signal, hidden, SIGBREAK=signal.SIGHUP)
        modules["msvcrt"] = fake_msvcrt()
        refuse_open_files()
        sys.modules["uvloop"] = None  # not installed there, as the requirements of Orbax say
    real_import = builtins.__import__

    def import_here(name, globals=None, locals=None, fromlist=(), level=0):
        spec = (globals or {}).get("__spec__")  # also of a module that runs as __main__
        if getattr(spec, "name", "").split(".")[0] == "gpt2_jax":
            if name in MISSING_MODULES[system]:
                raise ModuleNotFoundError(f"No module named {name!r}")
            if name in modules:
                return modules[name]
        return real_import(name, globals, locals, fromlist, level)

    builtins.__import__ = import_here


def fake_msvcrt():
    import fcntl

    def locking(descriptor, mode, n_bytes):
        assert (mode, n_bytes) == (module.LK_NBLCK, 1)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(error.errno, "Permission denied") from None

    module = ModuleType("msvcrt")
    module.LK_NBLCK, module.locking = 2, locking
    return module


def refuse_open_files():
    """Lets this process delete and rename no file that it has open or mapped, and rename nothing onto a file."""

    def check(path, dir_fd):
        if dir_fd is not None:
            path = os.path.join(f"/proc/self/fd/{dir_fd}", os.fspath(path))
        path = os.path.realpath(os.fspath(path))
        names = set()
        for number in os.listdir("/proc/self/fd"):
            try:
                names.add(os.readlink(f"/proc/self/fd/{number}"))
            except FileNotFoundError:  # that of the listing itself
                continue
        with open("/proc/self/maps") as maps:
            names |= {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
        held = [name for name in names if name == path or name.startswith(f"{path}/")]
        if any(os.path.isfile(name) for name in held):
            raise PermissionError(13, "The process cannot access the file because it is open", path)

    def guarded(function, onto_files=True):
        def call(path, *args, dir_fd=None, src_dir_fd=None, **others):
            check(path, dir_fd if dir_fd is not None else src_dir_fd)
            for target in args[:1]:
                if not onto_files and os.path.lexists(target):
                    raise FileExistsError(17, "Cannot create a file when that file already exists", target)
                check(target, None)
            numbers = {"dir_fd": dir_fd, "src_dir_fd": src_dir_fd}
            return function(path, *args, **{key: n for key, n in numbers.items() if n is not None}, **others)

        return call

    followed = os.supports_dir_fd, os.supports_follow_symlinks
    for name in ("unlink", "remove", "replace", "rename"):
        real = getattr(os, name)
        setattr(os, name, guarded(real, onto_files=name != "rename"))
        for supports in followed:
            if real in supports:
                supports.add(getattr(os, name))


if "SIMULATED_SYSTEM" in os.environ:
    simulate(os.environ["SIMULATED_SYSTEM"])
