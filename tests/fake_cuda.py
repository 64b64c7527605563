"""Training steps and an evaluation on a GPU that is not there: what the program would ask of it.

    python tests/fake_cuda.py adamw-bf16-ema-8           # optimizer, precision, ema or plain, ranks; prints JSON
    python tests/fake_cuda.py --list adamw-bf16-ema-8    # copies, waits and operations by source line, too
    python tests/fake_cuda.py faults                     # a step with each of FAULTS

Needs gcc and a PyTorch built for CUDA. CUDA's runtime is a stub (RUNTIME) with one H100; messages between ranks are
left out. Tensors on the CPU are real, those on the GPU have shape and type only (FakeTensorMode). So devices, types and
shapes are checked as on a GPU, but there are no values: whatever needs one, such as item(), bool(), nonzero() or a mask
as an index, is an error. Copied to the CPU, they are zeros. What an operation does inside, such as cuDNN's loop over
time or CTC's copies of its lengths, is not seen.
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
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self
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

ROOT = Path(__file__).resolve().parent.parent
HEADERS = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/include"
UTTERANCES, SECONDS = 128, 13.7  # of a rank's batch; the longest

# The part of CUDA's runtime that torch itself calls. Page-locked memory is remembered, and waiting is reported.
RUNTIME = r"""
#include <driver_types.h>
#include <stdlib.h>
static void (*report_wait)(void);
void on_wait(void (*function)(void)) { report_wait = function; }
static int wait_here(void) { if (report_wait) report_wait(); return 0; }
int cudaEventSynchronize(void *event) { return wait_here(); }
int cudaStreamSynchronize(void *stream) { return wait_here(); }
int cudaDeviceSynchronize(void) { return wait_here(); }

static struct { char *start; size_t size; } locked[1000];
static int blocks;
int cudaHostAlloc(void **start, size_t size, unsigned flags) {
    if (blocks == 1000) return cudaErrorMemoryAllocation;
    locked[blocks].size = size;
    *start = locked[blocks++].start = malloc(size);
    return 0;
}
int cudaFreeHost(void *start) { return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    attributes->type = cudaMemoryTypeUnregistered;
    for (int i = 0; i < blocks; i++)
        if ((char *)pointer >= locked[i].start && (char *)pointer < locked[i].start + locked[i].size)
            attributes->type = cudaMemoryTypeHost;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *is, int device) {
    *is = (struct cudaDeviceProp){.name = "H100", .major = 9, .multiProcessorCount = 132, .totalGlobalMem = 80ul << 30};
    return 0;
}
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 80ul << 30; return 0; }
int cudaDriverGetVersion(int *version) { *version = 99000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaFree(void *start) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = (void *)1; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = 0; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return 0; }
int cudaEventDestroy(void *event) { return 0; }
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


class Needs(NamedTuple):
    """What a step or an evaluation needs of the GPU; in the tests also the most that it may."""

    waits: int  # for the GPU
    pageable_copies: int  # to the GPU, of memory that is not page-locked
    pageable_bytes: int  # of the largest of them
    operations: int  # that have kernels
    gigabytes: float  # read and written by them at least
    gru: str  # the type in which cuDNN computes the recurrent layers


# Operations without a kernel.
FREE = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "diagonal", "empty", "empty_like"}
FREE |= {"empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "t"}
FREE |= {"slice", "split", "split_with_sizes", "squeeze", "transpose", "unbind", "unfold", "unsqueeze", "view"}
COPIES = {"_to_copy", "to", "copy_"}
LENGTHS_ON_CPU = {"_ctc_loss", "_ctc_loss_backward"}
ONE_TYPE = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_cudnn_rnn"}


def ctc(log_probabilities_TBV: Tensor, targets: Tensor, frames_B: Any, lengths_B: Any, *_: Any) -> tuple[Tensor, ...]:
    time, batch, _labels = log_probabilities_TBV.shape
    with unset_fake_temporarily():
        states = 2 * int(max(lengths_B)) + 1
    return log_probabilities_TBV.new_empty(batch), log_probabilities_TBV.new_empty(batch, time, states)


def cudnn_backward(data: Tensor, weights: list[Tensor], _stride: int, _buffer: Tensor, hx: Tensor, *_: Any) -> tuple:
    return torch.empty_like(data), torch.empty_like(hx), None, [torch.empty_like(weight) for weight in weights]


# Operations that FakeTensorMode does not have.
STAND_INS: dict[str, Callable[..., Any]] = {
    "_ctc_loss": ctc,
    "_ctc_loss_backward": lambda _gradient, log_probabilities, *_: torch.empty_like(log_probabilities),
    "_cudnn_rnn_backward": cudnn_backward,
    "_fused_sgd_": lambda *_: None,
    "record_stream": lambda *_: None,
}


class Recorder(TorchDispatchMode):
    """Keeps tensors on the CPU real and those on the GPU fake, and counts what is done with the latter by line."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.operations: Counter[tuple[str, str]] = Counter()  # by line and name
        self.bytes: Counter[str] = Counter()  # by line
        self.copies: Counter[tuple[str, bool, int]] = Counter()  # by line, whether from page-locked memory, and bytes
        self.waits: Counter[tuple[str, str]] = Counter()  # by line and reason
        self.gru: set[str] = set()

    def needs(self) -> Needs:
        """Return what was counted."""
        pageable = [size for (_, pinned, size), count in self.copies.items() if not pinned for _ in range(count)]
        operations, size = self.operations.total(), self.bytes.total() / 1e9
        gru = ", ".join(sorted(self.gru))
        return Needs(self.waits.total(), len(pageable), max(pageable, default=0), operations, round(size, 1), gru)

    def print(self) -> None:
        """Print what was counted, line by line."""
        for (line, reason), count in self.waits.items():
            print(f"  wait: {reason} x {count}, {line}")
        for (line, pinned, size), count in sorted(self.copies.items(), key=lambda item: -item[0][2]):
            print(f"  copy: {size:>12,} B x {count} from {'page-locked' if pinned else 'PAGEABLE'} memory, {line}")
        for line, size in self.bytes.most_common():
            names = {name: count for (where, name), count in self.operations.items() if where == line}
            print(f"  {size / 1e9:8.3f} GB  {line:48} {', '.join(f'{name} {n}' for name, n in names.items())}")

    def __enter__(self) -> Self:
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

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
        line = source_line()
        if name in COPIES and (on_cpu or device == "cpu"):
            from_gpu = device == "cpu" or (name == "copy_" and args[0] is on_cpu[0])
            if not (args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)):
                self.waits[line, f"blocking copy {'from' if from_gpu else 'to'} the GPU"] += 1
            with unset_fake_temporarily():
                if from_gpu and name == "copy_":
                    return args[0]
                if from_gpu:
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                self.copies[line, on_cpu[-1].is_pinned(), on_cpu[-1].nbytes] += 1
        elif name not in LENGTHS_ON_CPU and any(x.ndim for x in on_cpu):
            raise RuntimeError(f"{name} of tensors on the CPU and on the GPU")
        if name in ONE_TYPE and len({x.dtype for x in on_gpu}) > 1:
            raise RuntimeError(f"{name} of tensors of different types")
        if name == "_cudnn_rnn":
            self.gru.add(str(args[0].dtype).removeprefix("torch."))
        if name in STAND_INS:
            result = STAND_INS[name](*args)
        else:
            result = function(*tree_map_only(Tensor, self._as_fake, args), **kwargs)
        if name not in FREE:
            self.operations[line, name] += 1
            self.bytes[line] += sum(x.nbytes for x in (*on_gpu, *tree_iter(result)) if isinstance(x, FakeTensor))
        return result

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def source_line() -> str:
    """Return the innermost line of pytorch/ that is under way."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "pytorch"):
            return f"{path.relative_to(ROOT / 'pytorch')}:{line} {frame.f_code.co_name}"
    return "(backward)"


def cudnn_gru(data: Tensor, batch_sizes: Tensor, hx: Tensor, weights: list[Tensor], *options: Any) -> Any:
    """Compute torch._VF.gru of packed sequences as cuDNN does: in float16 under autocast, whatever that asks for."""
    _biases, layers, dropout, training, bidirectional = options
    if torch.is_autocast_enabled("cuda"):
        data, hx, *weights = (tensor.half() for tensor in (data, hx, *weights))
    sizes = hx.shape[2], 0, layers, False, dropout, training, bidirectional, batch_sizes.tolist(), None
    return torch.ops.aten._cudnn_rnn(data, weights, 4, weights[0].detach(), hx, None, 3, *sizes)[:2]


def to(module: nn.Module, device: torch.device) -> nn.Module:
    """Do as nn.Module.to, which with fake tensors fails at the weak references that recurrent layers keep."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            each._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().to(device))
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else buffer.to(device)
        if isinstance(each, nn.RNNBase):
            each._flat_weights = [getattr(each, name) for name in each._flat_weights_names]
            each._flat_weight_refs = [weakref.ref(weight) for weight in each._flat_weights if weight is not None]
    return module


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
    on_wait = ctypes.CFUNCTYPE(None)(lambda: recorder.waits.update([(source_line(), "synchronization")]))
    ctypes.CDLL(os.environ["LD_PRELOAD"]).on_wait(on_wait)
    with ExitStack() as stack:
        for target, name, value in (
            (fake_tensor, "init_gpu_context", lambda _: None),
            (nn.Module, "to", to),
            (nn.RNNBase, "flatten_parameters", lambda _: None),
            (nn.init, "orthogonal_", lambda tensor, gain=1: tensor),  # would take seconds
            (nn.parallel.distributed, "_verify_param_shape_across_processes", lambda *_, **__: None),
            (nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (torch._VF, "gru", cudnn_gru),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield stack.enter_context(recorder)


# What may be planted into a step, as a function of its logits.
FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda logits: None,
    "item": lambda logits: logits.sum().item(),
    "bool": lambda logits: bool(logits.isfinite().all()),
    "nonzero": lambda logits: logits.nonzero(),
    "mask as an index": lambda logits: logits[logits > 0],
    "tensor left on the CPU": lambda logits: logits + torch.ones(logits.shape[-1]),
    "index left on the CPU": lambda logits: logits[torch.zeros(1, dtype=torch.int64)],
    "matrix of another type": lambda logits: logits[0] @ logits[0].double().t(),
    "blocking copy to the GPU": lambda logits: torch.ones(1).pin_memory().to(logits.device),
    "blocking copy from the GPU": lambda logits: logits.cpu(),
    "synchronization": lambda logits: torch.cuda.synchronize(),
    "pageable copy": lambda logits: torch.ones(2**20).to(logits.device, non_blocking=True),
    "more operations": lambda logits: [logits + 1 for _ in range(100)],
}


def plant(fault: Callable[[Tensor], Any], _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    """Do as a forward hook of the model what the fault does."""
    fault(output[0])


def rehearse(case: str, measure: Callable[[str, Callable[[], Any]], None]) -> None:
    """Call `measure` with the name and the function of everything that is to be measured, in order."""
    from data.packed import Subset
    from pytorch.config import CONFIGS
    from pytorch.distributed import World
    from pytorch.evaluation import evaluate
    from pytorch.loader import TrainingLoader, Utterances
    from pytorch.trainer import Trainer

    optimizer: Any
    precision: Any
    optimizer, precision, ema, ranks = ("adamw-fp32-plain-1" if case == "faults" else case).split("-")
    world = World(0, int(ranks))
    config = dataclasses.replace(
        CONFIGS["librispeech"],
        optimizer=optimizer,
        precision=precision,
        ema_decay=0.99 if ema == "ema" else 0.0,
        noise_probability=0.5 if ema == "ema" else 0.0,  # the configurations that have an EMA have noise, too
        batch_size=UTTERANCES * world.size,
        augment_from_epoch=1,
    )
    samples = (np.linspace(0.8, 1, config.batch_size) * SECONDS * 16000).astype(np.int64)
    audio = np.random.default_rng(0).integers(-1000, 1000, samples[-1]).astype(np.int16)
    names, texts = [str(n) for n in samples], ["AB" * int(7 * n / 16000) for n in samples]  # 14 labels a second
    utterances = Utterances([Subset("", audio, np.zeros_like(samples), samples, names, names, texts)])
    if world.size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    trainer = Trainer(config, torch.device("cuda", 0), world)
    if world.size > 1:
        trainer.ddp_model.register_comm_hook(None, all_reduce)  # type: ignore[operator]
        trainer.ddp_model.logger = mock.Mock()  # waits for the GPU in the first ten steps, then in every hundredth
    ((_, batches),) = TrainingLoader(utterances, config, world, pin_memory=True).epoch(1, 0, 1)

    def step(accumulation: int = 1) -> Callable[[], Tensor]:
        trainer.model.train()
        return trainer.train_step(batches * accumulation, config.batch_size * accumulation, 1e-3, (False, True))

    def evaluation() -> None:
        size = UTTERANCES * int(samples[-1])
        forward = partial(trainer.logits, trainer.eval_model.eval())
        evaluate(forward, utterances, World(), max_batch_samples=size, pin_memory=True)

    if case == "faults":
        step()
        for name, fault in FAULTS.items():
            planted = trainer.model.register_forward_hook(partial(plant, fault))
            measure(name, step)
            planted.remove()
    else:
        measure("warm-up", lambda: trainer.warm_up(int(samples[-1])))
        measure("accumulating step", lambda: step(accumulation=2)())
        measure("step", step)
        if world.size == 1:
            measure("evaluation", evaluation)
    if world.size > 1:
        dist.destroy_process_group()


def main(arguments: list[str]) -> None:
    """Print for each case and what it measures a line of JSON: names, error, needs."""

    def measure(name: str, action: Callable[[], Any]) -> None:
        recorder.clear()
        error = None
        try:
            action()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            traceback.print_exc()
        print(json.dumps([case, name, error, recorder.needs()]))
        if "--list" in arguments:
            recorder.print()

    with fake_gpu() as recorder:
        for case in arguments:
            if case != "--list":
                rehearse(case, measure)


if __name__ == "__main__":
    if "LD_PRELOAD" in os.environ:
        main(sys.argv[1:])
    else:
        sys.exit(unavailable() or start(*sys.argv[1:]).returncode)
