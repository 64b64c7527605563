"""Training steps and an evaluation on a GPU that is not there: what the program would ask of it.

    python -m tests.fake_cuda adamw-bf16-ema-8           # optimizer, precision, ema or plain, ranks; prints JSON
    python -m tests.fake_cuda --list adamw-bf16-ema-8    # copies, waits and operations by source line, too
    python -m tests.fake_cuda librispeech-16             # configuration in bf16, utterances of a batch
    python -m tests.fake_cuda faults                     # a step with each of FAULTS

Needs gcc and a PyTorch built for CUDA. CUDA's runtime is a stub (RUNTIME) with one H100; messages between ranks are
left out. Launches of Triton's kernels are counted, not done; cuDNN's GRUs, which fp32 would need, are missing. Tensors
on the CPU are real, those on the GPU have shape and type only (FakeTensorMode). So devices, types and shapes are
checked as on a GPU, but there are no values: whatever needs one, such as item(), bool(), nonzero() or a mask as an
index, is an error. Copied to the CPU, they are zeros. What an operation does inside, such as CTC's copies of its
lengths, is not seen; nor is waiting by asking an event again and again.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from data.packed import Subset
from pytorch.config import CONFIGS
from pytorch.distributed import World
from pytorch.evaluation import evaluate
from pytorch.layers import gru, gru_triton
from pytorch.loader import TrainingLoader, Utterances
from pytorch.trainer import Trainer
from pytorch.warmup import warm_up

ROOT = Path(__file__).resolve().parent.parent
HEADERS = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/include"
UTTERANCES, SECONDS = 128, 13.7  # of a rank's batch; the longest, but of an4 4 s
GPU = torch.device("cuda", 0)

# The part of CUDA's runtime and driver that torch itself calls.
RUNTIME = r"""
#include <driver_types.h>
#include <stdlib.h>
#define SUCCEED(name) int name() { return 0; }
#define WAIT(name) int name() { if (report_wait) report_wait(); return 0; }
#define SET(name, type, value) int name(type *result) { *result = value; return 0; }
#define SET_SECOND(name, type, value) int name(void *handle, type *result) { *result = value; return 0; }

static void (*report_wait)(void);
void on_wait(void (*function)(void)) { report_wait = function; }
WAIT(cudaEventSynchronize) WAIT(cudaStreamSynchronize) WAIT(cudaDeviceSynchronize)

static struct { char *start; size_t size; } locked[1000];  // page-locked memory, which is never freed
static int blocks;
int cudaHostAlloc(void **start, size_t size) {
    if (blocks == 1000) return cudaErrorMemoryAllocation;
    locked[blocks].size = size;
    *start = locked[blocks++].start = malloc(size);
    return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, char *pointer) {
    attributes->type = cudaMemoryTypeUnregistered;
    for (int i = 0; i < blocks; i++)
        if (pointer >= locked[i].start && pointer < locked[i].start + locked[i].size)
            attributes->type = cudaMemoryTypeHost;
    return 0;
}

SET(cudaGetDeviceProperties, struct cudaDeviceProp, ((struct cudaDeviceProp){.name = "H100", .major = 9,
    .multiProcessorCount = 132, .sharedMemPerMultiprocessor = 233472}))
SET(cudaGetDeviceCount, int, 1) SET(cudaGetDevice, int, 0) SET(cudaDriverGetVersion, int, 99000)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0; }
SET(cudaStreamCreateWithPriority, void *, (void *)1) SET(cudaEventCreateWithFlags, void *, (void *)1)
SET_SECOND(cudaStreamGetCaptureInfo, int, 0) SET_SECOND(cudaStreamIsCapturing, int, 0)
SUCCEED(cudaSetDevice) SUCCEED(cudaGetLastError) SUCCEED(cudaPeekAtLastError) SUCCEED(cudaFree) SUCCEED(cudaFreeHost)
SUCCEED(cudaStreamQuery) SUCCEED(cudaStreamWaitEvent) SUCCEED(cudaEventDestroy)
SUCCEED(cudaEventRecord) SUCCEED(cudaEventRecordWithFlags) SUCCEED(cudaEventQuery)
"""


def unavailable() -> str | None:
    """Return what this machine lacks for it, if anything."""
    if shutil.which("gcc") is None:
        return "gcc is missing"
    return None if torch.version.cuda and HEADERS.is_dir() else "this PyTorch is not built for CUDA"


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this module in a process of its own, with the stub in the place of CUDA's runtime and driver."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/libcuda.so.1"
        compiler = ["gcc", "-xc", "-", "-shared", "-fPIC", f"-I{HEADERS}", "-o", library]
        subprocess.run(compiler, input=RUNTIME, text=True, check=True)
        environment = os.environ | {"LD_PRELOAD": library, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, text=True, **options)


class Event(NamedTuple):
    """Something that the GPU is asked for, or that it has to be waited for."""

    kind: str  # "wait", "copy" from page-locked memory, "pageable copy" or "operation" that has a kernel
    line: str  # of pytorch/
    what: str  # name of the operation, or the reason to wait
    bytes: int = 0  # copied, or read and written by the operation at least


class Needs(NamedTuple):
    """What a step or an evaluation needs of the GPU; in the tests also the most that it may."""

    waits: int
    pageable_copies: int
    pageable_bytes: int  # of the largest of them
    operations: int
    gigabytes: float  # of operations


# Operations without a kernel, beside views.
FREE = {"_unsafe_view", "device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"_to_copy", "to", "copy_"}
LENGTHS_ON_CPU = {"_ctc_loss", "_ctc_loss_backward"}
ONE_TYPE = {"mm", "addmm", "bmm", "baddbmm"}


def ctc(log_probabilities_TBV: Tensor, targets: Tensor, frames_B: Any, lengths_B: Any, *_: Any) -> tuple[Tensor, ...]:
    time, batch, _labels = log_probabilities_TBV.shape
    with unset_fake_temporarily():
        states = 2 * int(max(lengths_B)) + 1
    return log_probabilities_TBV.new_empty(batch), log_probabilities_TBV.new_empty(batch, time, states)


def by_channel(rows_NC: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    first_C, second_C = rows_NC.new_empty(2, rows_NC.shape[1], dtype=torch.float32)
    return first_C, second_C


# Operations that FakeTensorMode does not have.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_ctc_loss": ctc,
    "_ctc_loss_backward": lambda _gradient, log_probabilities, *_: torch.empty_like(log_probabilities),
    "_fused_sgd_": lambda *_: None,
    "batch_norm_stats": by_channel,
    "batch_norm_elemt": lambda rows, *_: torch.empty_like(rows),
    "batch_norm_backward_reduce": lambda _gradient, rows, *_: (*by_channel(rows), None, None),
    "batch_norm_backward_elemt": lambda gradient, *_: torch.empty_like(gradient),
}


class Recorder(TorchDispatchMode):
    """Keeps tensors on the CPU real and those on the GPU fake, and notes what is done with the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.events: list[Event] = []

    def needs(self) -> Needs:
        """Return what was noted, in figures."""
        count = Counter(event.kind for event in self.events)
        largest = max((event.bytes for event in self.events if event.kind == "pageable copy"), default=0)
        size = sum(event.bytes for event in self.events if event.kind == "operation")
        return Needs(count["wait"], count["pageable copy"], largest, count["operation"], round(size / 1e9, 1))

    def print(self) -> None:
        """Print what was noted; what moves most bytes comes first."""
        for event, count in sorted(Counter(self.events).items(), key=lambda item: -item[0].bytes * item[1]):
            print(f"  {event.bytes * count / 1e9:8.3f} GB  {event.line:48} {event.kind}: {event.what} x {count}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, device = function._schema.name.split("::")[1], str(kwargs.get("device"))
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        on_cpu = [x for x in tensors if not isinstance(x, FakeTensor)]
        if not on_gpu and not device.startswith("cuda"):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if name.startswith("_use_"):  # another CTC: cuDNN's takes only int32
            return "cudnn" in name and all(x.dtype == torch.int32 for x in args[1:4])
        if name in COPIES and (on_cpu or device == "cpu"):
            from_gpu = device == "cpu" or (name == "copy_" and args[0] is on_cpu[0])
            if not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)):
                self.wait(f"blocking copy {'from' if from_gpu else 'to'} the GPU")
            with unset_fake_temporarily():
                if from_gpu and name == "copy_":
                    return args[0]
                if from_gpu:
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                kind = "copy" if on_cpu[-1].is_pinned() else "pageable copy"
                self.events.append(Event(kind, source_line(), name, on_cpu[-1].nbytes))
        elif name not in LENGTHS_ON_CPU and any(x.ndim for x in on_cpu):
            raise RuntimeError(f"{name} of tensors on the CPU and on the GPU")
        if name in ONE_TYPE and len({x.dtype for x in on_gpu}) > 1:
            raise RuntimeError(f"{name} of tensors of different types")
        if name in STAND_INS:
            result = STAND_INS[name](*args)
        else:
            result = function(*tree_map_only(Tensor, self._as_fake, args), **kwargs)
        if name not in FREE and not function.is_view:
            moved = [*on_gpu, *([] if name == "copy_" else tree_iter(result))]
            moved = on_gpu[1:] + on_gpu[2:] if name == "index_copy_" else moved  # of rows only
            self.operation(name, *moved)
        return result

    def wait(self, reason: str) -> None:
        """Note that a thread waits for the GPU."""
        self.events.append(Event("wait", source_line(), reason))

    def operation(self, name: str, *arguments: Any, **_: Any) -> None:
        """Note an operation, such as a launch of a Triton kernel, which reads or writes each of its tensors once."""
        size = sum(x.nbytes for x in arguments if isinstance(x, FakeTensor))
        self.events.append(Event("operation", source_line(), name, size))

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def source_line(frames: Iterable[tuple[FrameType, int]] = ()) -> str:
    """Return the first line of pytorch/ among frames: those that are under way, from the innermost one, or others."""
    for frame, line in frames or traceback.walk_stack(sys._getframe(1)):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "pytorch"):
            return f"{path.relative_to(ROOT / 'pytorch')}:{line} {frame.f_code.co_name}"
    return "(backward)"


def all_reduce(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Leave the gradients of DDP's bucket as they are."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@contextmanager
def fake_gpu() -> Iterator[Recorder]:
    """Make tensors on the GPU fake, with everything replaced in torch that fails with these."""
    torch.cuda.init()
    recorder = Recorder()
    on_wait = ctypes.CFUNCTYPE(None)(lambda: recorder.wait("synchronization"))
    ctypes.CDLL(os.environ["LD_PRELOAD"]).on_wait(on_wait)
    with ExitStack() as stack:
        for target, name, value in (
            (fake_tensor, "init_gpu_context", lambda _: None),
            (nn.modules.rnn, "weakref", SimpleNamespace(ref=lambda weight: lambda: weight)),  # forbid to swap weights
            (nn.RNNBase, "flatten_parameters", lambda _: None),
            (nn.init, "orthogonal_", lambda tensor, gain=1: tensor),  # would take seconds
            (nn.parallel.distributed, "_verify_param_shape_across_processes", lambda *_, **__: None),
            (nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (gru, "has_triton_kernel", lambda device, *_: gru_triton.supported(device, False)),
            (gru_triton, "_forward", defaultdict(lambda: partial(recorder.operation, "gru_forward"))),
            (gru_triton, "_backward", defaultdict(lambda: partial(recorder.operation, "gru_backward"))),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(recorder.fake)
        yield stack.enter_context(recorder)


# What may be planted into a step, as a function of its logits, and what is then to be complained of.
FAULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda logits: None, ""),
    "item": (lambda logits: logits.sum().item(), "aten._local_scalar_dense"),
    "tensor left on the CPU": (lambda logits: logits + torch.ones(29), "add of tensors on the CPU and on the GPU"),
    "matrices of two types": (lambda logits: logits[0] @ logits[0].double().t(), "mm of tensors of different types"),
    "blocking copy": (lambda logits: logits.cpu(), "waits"),
    "synchronization": (lambda logits: torch.cuda.synchronize(), "waits"),
    "pageable copy": (lambda logits: torch.ones(2**20).to("cuda", non_blocking=True), "pageable_bytes: 4194304"),
    "more operations": (lambda logits: [logits + 1 for _ in range(100)], "operations"),
    "more bytes": (lambda logits: logits.new_zeros(2**30), "gigabytes"),
}


def plant(fault: Callable[[Tensor], Any], _module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
    """Do as a forward hook of the model what the fault does."""
    fault(outputs[0])


def rehearse(case: str, measure: Callable[[str, Callable[[], Any]], None]) -> None:
    """Call `measure` with the name and the function of everything that is to be measured, in order."""
    changes: dict[str, Any]
    name, *rest, number = ("adamw-bf16-plain-1" if case == "faults" else case).split("-")
    if name in CONFIGS:
        base, world, changes = CONFIGS[name], World(), {"precision": "bf16", "batch_size": int(number)}
    else:
        base, world = CONFIGS["librispeech"], World(0, int(number))
        changes = {"optimizer": name, "precision": rest[0], "ema_decay": 0.99 if rest[1] == "ema" else 0.0}
        changes["batch_size"] = UTTERANCES * world.size
    config = dataclasses.replace(base, augment_from_epoch=1, **changes)
    seconds = 4 if name == "an4" else SECONDS
    samples = (np.linspace(0.8, 1, config.batch_size) * seconds * 16000).astype(np.int64)
    capacity = UTTERANCES * int(samples[-1])
    audio = np.random.default_rng(0).integers(-1000, 1000, samples[-1]).astype(np.int16)
    names, texts = [str(n) for n in samples], ["AB" * int(7 * n / 16000) for n in samples]  # 14 labels a second
    utterances = Utterances([Subset("", audio, np.zeros_like(samples), samples, names, names, texts)])
    if world.size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    trainer = Trainer(config, GPU, world)
    if world.size > 1:
        trainer.ddp_model.register_comm_hook(None, all_reduce)  # type: ignore[operator]
        trainer.ddp_model.logger = mock.Mock()  # waits for the GPU in the first ten steps, then in every hundredth
    ((_, batches),) = TrainingLoader(utterances, config, world, GPU).epoch(1, 0, 1)

    def step(accumulation: int = 1) -> Callable[[], Tensor]:
        trainer.model.train()
        return trainer.train_step(batches * accumulation, config.batch_size * accumulation, 1e-3, (False, True))

    def evaluation() -> None:
        trainer.eval_model.eval()
        evaluate(trainer.evaluate_logits, utterances, world, max_batch_samples=capacity, device=GPU)

    if case == "faults":
        step()
        for name, (fault, _) in FAULTS.items():
            with trainer.model.register_forward_hook(partial(plant, fault)):
                measure(name, step)
        return
    measure("warm-up", lambda: warm_up(trainer, int(samples[-1])))
    measure("accumulating step", lambda: step(accumulation=2)())
    measure("step", step)
    if world.size == 1:
        measure("evaluation", evaluation)
    else:
        dist.destroy_process_group()


def main(arguments: list[str]) -> None:
    """Print for each case and what it measures a line of JSON: names, error, needs."""

    def measure(name: str, action: Callable[[], Any]) -> None:
        recorder.events.clear()
        error = None
        try:
            action()
        except Exception as problem:
            frames = list(traceback.walk_tb(problem.__traceback__))
            error = f"{type(problem).__name__}: {str(problem).splitlines()[0]}, {source_line(frames[::-1])}"
        print(json.dumps([case, name, error, recorder.needs()]))
        if "--list" in arguments:
            recorder.print()

    with fake_gpu() as recorder:
        for case in arguments:
            if case != "--list":
                rehearse(case, measure)


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
    elif "LD_PRELOAD" in os.environ:
        main(sys.argv[1:])
    else:
        sys.exit(unavailable() or start(*sys.argv[1:]).returncode)
