"""Memory that is read-only at times, and whether a crash came from writing to it.

The kernel kills whoever writes to a read-only page (SIGSEGV); Python's faulthandler then tells the line. It does not
tell the address, so a handler that runs before it notes where the write went:

    words[at]      memories that are read-only now
    words[at + 1]  0 no crash, 1 it wrote to one of them, 2 it crashed elsewhere

[Note: a handler in Python]
The handler needs Python's lock. The thread that crashed holds it, or has given it up, as torch does before it computes;
then it is free, or soon will be. Only a kernel's further threads could crash while the first keeps the lock, so with
several threads there is no handler, and nobody knows for certain what a crash was.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import signal
import sys

import torch

WROTE, ELSEWHERE = 1, 2

_SA_SIGINFO = 4
_CODE, _ADDRESS = 8, 16
"""Bytes from the start of siginfo_t to si_code and si_addr, on 64-bit Linux."""


class _Action(ctypes.Structure):
    """The C library's struct sigaction, on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Pages:
    """Memories of this process that can be closed to writing, each on pages of its own."""

    def __init__(self, words: memoryview, at: int):
        """Keep notes in `words` (int64), at `at` and the place behind it, where others can read them."""
        self._words = words
        self._at = at
        self._closed: dict[int, int] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._before = _Action()
        self._has_handler = False
        self._pid = os.getpid()

    def protect(self, memory: torch.Tensor, read_only: bool) -> None:
        """Make a memory read-only for this process, or writable again.

        Args:
            memory: starts on a page, and no other memory lies on its last one.
            read_only: which.

        Raises:
            OSError: the kernel refused.
        """
        start = memory.data_ptr()
        length = -(-max(memory.numel(), 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        if read_only and not self._has_handler and torch.get_num_threads() == 1:
            self._handle_faults()
        access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        if self._libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), access):
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect: {os.strerror(number)}")
        if read_only:
            self._closed[start] = start + length
        else:
            self._closed.pop(start, None)
        self._words[self._at] = len(self._closed)

    def _handle_faults(self) -> None:
        """Note where a fault was before faulthandler, or whoever else handles it. See [Note: a handler in Python]."""
        if sys.maxsize < 1 << 32 or platform.machine() not in ("x86_64", "aarch64"):
            return
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._on_fault)
        mine = _Action(handler=ctypes.cast(self._callback, ctypes.c_void_p), flags=_SA_SIGINFO)
        failed = self._libc.sigaction(signal.SIGSEGV, ctypes.byref(mine), ctypes.byref(self._before))
        self._has_handler = not failed

    def _on_fault(self, number: int, info: int, context: int) -> None:
        self._libc.sigaction(number, ctypes.byref(self._before), None)
        # A child that a data loader forked is not the worker.
        if os.getpid() == self._pid:
            was_sent = ctypes.c_int.from_address(info + _CODE).value <= 0
            address = ctypes.c_size_t.from_address(info + _ADDRESS).value
            wrote = not was_sent and any(start <= address < stop for start, stop in self._closed.items())
            with contextlib.suppress(ValueError):
                self._words[self._at + 1] = WROTE if wrote else ELSEWHERE
        # Comes again, to those who handled it before, as soon as this handler is left.
        signal.raise_signal(number)
