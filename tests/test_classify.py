"""From the evidence that a probe left to the outcome; what is not known stays unknown."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.errors import raised_in
from autotune.outcome import Crashed, Outcome, OutOfMemory, TimedOut, Unknown
from autotune.probe.classify import Death, Evidence, classify, exhausted_memory

NOTHING = Evidence(
    device_kind="cpu",
    deaths=(),
    exit_codes=(0, 0),
    phase="micro-batch 4",
    idle_s=12.0,
    timed_out=False,
    kernel_kills=0,
    log_tail="the last line",
)
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 536870912 bytes. Error code 12 (Cannot allocate memory)"
)
DEVICE, HOST = "device", "host"


def death(exception: str, message: str = "", rank: int = 0) -> Death:
    return Death(rank=rank, exception=exception, message=message)


@pytest.mark.parametrize(
    ("exception", "message", "on_cpu", "on_cuda"),
    [
        ("builtins.RuntimeError", CPU_ALLOCATOR, DEVICE, HOST),
        ("builtins.MemoryError", "", DEVICE, HOST),
        ("builtins.OSError", "[Errno 12] Cannot allocate memory", DEVICE, HOST),
        ("builtins.RuntimeError", "std::bad_alloc", DEVICE, HOST),
        ("torch.OutOfMemoryError", "", DEVICE, DEVICE),
        ("torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to", DEVICE, DEVICE),
        ("builtins.RuntimeError", "CUDA out of memory", DEVICE, DEVICE),
        ("builtins.RuntimeError", "cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", DEVICE, DEVICE),
    ],
)
def test_an_allocator_says_whose_memory_ran_out(
    exception: str, message: str, on_cpu: str, on_cuda: str
) -> None:
    for device_kind, where in (("cpu", on_cpu), ("cuda", on_cuda)):
        evidence = replace(NOTHING, device_kind=device_kind, deaths=(death(exception, message),))
        outcome = classify(evidence)
        assert isinstance(outcome, OutOfMemory)
        assert outcome.where == where
        assert exception in outcome.evidence


RECORDED: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "recorded" / "deaths.jsonl").read_text().splitlines()
]
"""What torch, NCCL and CUDA's libraries said on machines of others; each with where it is found."""


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda line: line["source"].partition(" ")[0])
def test_what_others_saw_is_told_apart(recorded: dict[str, Any]) -> None:
    seen = Death(
        rank=0,
        exception=recorded["exception"],
        message=recorded["message"],
        raised_in=recorded.get("raised_in", ""),
    )

    assert exhausted_memory(seen, "cuda") == recorded["where"]
    assert recorded["source"].startswith("https://")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory",
        "CUDA error: out of memory",
        "cudaErrorMemoryAllocation",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUSOLVER_STATUS_ALLOC_FAILED",
        "CUSPARSE_STATUS_ALLOC_FAILED",
        "Cuda failure 2 'out of memory'",
        "Cuda failure 'out of memory'",
        "Failed to CUDA calloc",
    ],
)
def test_each_allocator_s_words_are_enough_by_themselves(message: str) -> None:
    for text in (message, message.upper(), f"before\n{message} after"):
        assert exhausted_memory(death("builtins.RuntimeError", text), "cuda") == "device"


@pytest.mark.parametrize(
    "message",
    [
        "out of memory",
        "[Errno 28] No space left on device",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUBLAS_STATUS_EXECUTION_FAILED",
        "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)",
        "Cuda failure 3 'initialization error'",
    ],
)
def test_other_words_are_no_out_of_memory(message: str) -> None:
    assert exhausted_memory(death("torch.AcceleratorError", message), "cuda") is None


def test_memory_to_be_pinned_is_the_host_s() -> None:
    pinning = replace(death("torch.AcceleratorError", "CUDA error: out of memory"))
    assert exhausted_memory(replace(pinning, raised_in="pin_memory"), "cuda") == "host"
    assert exhausted_memory(replace(pinning, raised_in="forward"), "cuda") == "device"


def test_a_size_that_no_memory_has_is_a_fault_and_no_lack() -> None:
    garbled = death("torch.OutOfMemoryError", "Tried to allocate more than 1EB memory")
    assert exhausted_memory(garbled, "cuda") is None
    outcome = classify(replace(NOTHING, device_kind="cuda", deaths=(garbled,)))
    assert isinstance(outcome, Crashed)


def test_an_exception_tells_the_function_that_it_comes_from() -> None:
    def pin_memory() -> None:
        raise RuntimeError

    def outer() -> None:
        pin_memory()

    with pytest.raises(RuntimeError) as caught:
        outer()
    assert raised_in(caught.value) == "pin_memory"
    assert raised_in(RuntimeError()) == ""


KILLED = replace(NOTHING, exit_codes=(0, -signal.SIGKILL))


@pytest.mark.parametrize(
    ("evidence", "outcome"),
    [
        pytest.param(
            replace(KILLED, kernel_kills=1),
            OutOfMemory(where="host", evidence="the kernel killed a rank for memory"),
            id="SIGKILL that the kernel counts as for memory",
        ),
        pytest.param(
            KILLED,
            Crashed(
                reason="rank 1 was ended by SIGKILL in phase micro-batch 4",
                evidence="the last line",
            ),
            id="SIGKILL that the kernel does not count",
        ),
        pytest.param(
            replace(KILLED, kernel_kills=1, deaths=(death("torch.DistBackendError", "closed"),)),
            OutOfMemory(where="host", evidence="the kernel killed a rank for memory"),
            id="the others' complaint about a rank that was killed for memory",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(None, 0), kernel_kills=3),
            Unknown(exit_code=0, evidence="the last line"),
            id="the kernel killed something else",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(-signal.SIGSEGV, None)),
            Crashed(
                reason="rank 0 was ended by SIGSEGV in phase micro-batch 4",
                evidence="the last line",
            ),
            id="SIGSEGV",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(-40, None)),
            Crashed(
                reason="rank 0 was ended by signal 40 in phase micro-batch 4",
                evidence="the last line",
            ),
            id="a signal without a name",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(-signal.SIGTERM, -signal.SIGKILL)),
            Crashed(
                reason="rank 1 was ended by SIGKILL in phase micro-batch 4",
                evidence="the last line",
            ),
            id="the killed one of several",
        ),
        pytest.param(
            NOTHING,
            Unknown(exit_code=0, evidence="the last line"),
            id="exit 0 without a word",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(0, 3)),
            Unknown(exit_code=3, evidence="the last line"),
            id="a failing rank beside one that went in order",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(None, None)),
            Unknown(exit_code=None, evidence="the last line"),
            id="no exit at all",
        ),
        pytest.param(
            replace(NOTHING, exit_codes=(None, None), timed_out=True, phase="build"),
            TimedOut(phase="build", seconds=12.0, evidence="the last line"),
            id="timeout",
        ),
        pytest.param(
            replace(NOTHING, deaths=(death("builtins.ValueError", "no", rank=1),)),
            Crashed(reason="rank 1: builtins.ValueError: no", evidence="the last line"),
            id="exception",
        ),
        pytest.param(
            replace(
                NOTHING,
                deaths=(
                    death("torch.DistBackendError", "connection closed by peer", rank=1),
                    death("builtins.RuntimeError", CPU_ALLOCATOR, rank=0),
                ),
            ),
            OutOfMemory(where="device", evidence=f"rank 0: builtins.RuntimeError: {CPU_ALLOCATOR}"),
            id="the rank that ran out of memory, though another fell first",
        ),
    ],
)
def test_evidence_is_an_outcome(evidence: Evidence, outcome: Outcome) -> None:
    assert classify(evidence) == outcome


exit_codes = st.lists(st.none() | st.integers(-64, 255), min_size=1, max_size=4).map(tuple)
harmless = st.builds(
    Death,
    rank=st.integers(0, 3),
    exception=st.sampled_from(["builtins.ValueError", "builtins.KeyError"]),
    message=st.sampled_from(["", "no", "memory is fine"]),
)
any_evidence = st.builds(
    Evidence,
    device_kind=st.sampled_from(["cpu", "cuda"]),
    deaths=st.lists(harmless, max_size=2).map(tuple),
    exit_codes=exit_codes,
    phase=st.just("build"),
    idle_s=st.floats(0, 1000),
    timed_out=st.booleans(),
    kernel_kills=st.integers(0, 2),
    log_tail=st.text(),
)


@given(any_evidence)
def test_whatever_is_left_is_some_outcome_but_never_a_measurement(evidence: Evidence) -> None:
    assert isinstance(classify(evidence), Crashed | OutOfMemory | TimedOut | Unknown)


@given(any_evidence)
def test_no_out_of_memory_without_a_word_of_an_allocator_or_of_the_kernel(
    evidence: Evidence,
) -> None:
    assert not isinstance(classify(replace(evidence, kernel_kills=0)), OutOfMemory)


@given(any_evidence)
def test_no_out_of_memory_of_the_host_without_a_rank_that_was_killed(evidence: Evidence) -> None:
    codes = tuple(0 if code == -signal.SIGKILL else code for code in evidence.exit_codes)
    assert not isinstance(classify(replace(evidence, exit_codes=codes)), OutOfMemory)


@pytest.mark.parametrize(
    "words", ["error", "ERROR: out of memory", "CUDA out of memory", CPU_ALLOCATOR, "Killed"]
)
@given(evidence=any_evidence)
def test_words_in_the_log_change_nothing(words: str, evidence: Evidence) -> None:
    without = replace(evidence, log_tail="")
    said = classify(replace(evidence, log_tail=words))
    assert type(said) is type(classify(without))
