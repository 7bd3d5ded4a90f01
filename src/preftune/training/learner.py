"""One optimizer update. accelerate's devices, precision and processes are known here alone.

Weights that sum to 1 over the global minibatch are built before any forward pass; an update is the sum of
terms · weights over all microbatches of all processes, so neither their size nor their number changes a
gradient beyond rounding. Gradients are summed after the last backward pass (`training.summing`).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor

from preftune.algorithms.base import Loss, Metrics
from preftune.config import OptimizerConfig
from preftune.errors import ConfigError
from preftune.faults import faultpoint
from preftune.functional import weighted_sum
from preftune.models.adapter import tie_alike
from preftune.models.memory import give_back_memory
from preftune.models.quantised import computes_in
from preftune.models.roles import Role, by_tree, models_of
from preftune.models.shards import is_sharded, number, shard
from preftune.models.trunk import forget_states, tie, trained_parameters
from preftune.stops import Interrupted, requested, stopping_point
from preftune.training.adamw import decayed_groups, schedule_factor
from preftune.training.precision import DTYPES, MIXED, Asked, Precision, effective_precision, refuse_emulation
from preftune.training.processes import introduce
from preftune.training.summing import fill, sum_gradients
from preftune.training.tally import Tally

T = TypeVar("T")
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # as accelerate's launcher asks for it
MAX_SCALED = 30  # updates in a row that an fp16 scaler may skip while it settles


@dataclass(slots=True)
class Trained:
    """A role with its optimizer and the learning rate that the schedule scales."""

    role: Role
    optimizer: torch.optim.Optimizer
    settings: OptimizerConfig
    learning_rates: list[float]
    skipped: int = 0  # updates in a row that were not finite


class Learner:
    """Owns the optimizers. Algorithms call `update`; the loop calls `set_progress`."""

    def __init__(
        self,
        precision: Asked = "float32",
        microbatch_size: int | None = None,
        process_timeout: float = 600.0,
        say: Callable[[str], None] = print,
        shard: bool = False,
        by_block: bool = False,
    ) -> None:
        """`process_timeout`: seconds that a process waits for the others; that of the first learner made in
        this process holds for all. `shard`: every process keeps a part of every weight, a single one all;
        `by_block`: see `models.shards`.

        ConfigError if accelerate is asked to shard models, which on CPUs it silently does not do.
        """
        _refuse_sharding()
        self.precision: Precision = effective_precision(precision)
        AcceleratorState._reset_state()  # it outlives an Accelerator, and refuses another precision
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=process_timeout))
        # Any: what it annotates is wider than what it returns.
        self.accelerator: Any = Accelerator(
            mixed_precision=MIXED[self.precision],
            kwargs_handlers=[patience],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else a variable says it
        )
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process  # it writes the files
        self.rank: int = self.accelerator.process_index  # the number of this process, from 0
        self.world: int = self.accelerator.num_processes
        self.is_alone = self.world == 1
        if not self.is_alone:
            introduce(self.gather_items)
        refuse_emulation(self.device, self.precision)
        self.microbatch_size = microbatch_size
        self.shard, self.by_block = shard and not self.is_alone, by_block
        self.say = say
        self._reported: set[str] = set()
        self.trained: dict[str, Trained] = {}
        self.bad_steps = 0  # in a row, with a number that is not finite
        self.updates = 0  # of the weights, in this step
        self.not_finite: list[str] = []  # what went wrong in this step
        self.scalars: dict[str, float] = {}  # of an algorithm and the loop (best, ...), from step to step
        self.measures = False  # `update` only looks: see `measuring`
        self.noted: dict[str, Tensor] = {}  # what an algorithm saw in this step (see `note`)

    @property
    def file_suffix(self) -> str:
        """What follows the name of a file of this process's parts: -00001-of-00002."""
        return f"-{self.rank + 1:05}-of-{self.world:05}"

    def gather_items(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of these."""
        return items if self.is_alone else gather_object(items)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def begin_step(self) -> None:
        """Forget the previous step, and the states kept in it."""
        forget_states()
        self.updates = 0
        self.not_finite.clear()
        self.noted.clear()

    def note(self, name: str, values: Tensor) -> None:
        self.noted[name] = values

    def say_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.say(text)

    def asked_to_stop(self) -> int:
        """The signal that any process got, or 0: the same in all processes."""
        if self.is_alone:
            return requested()
        return int(self.accelerator.gather(torch.tensor([requested()], device=self.device)).max())

    def place(self, batch: Any) -> Any:
        """This process's share of a global batch, on its device: as even as rows come; it may be empty."""
        return self.share(batch).to(self.device)

    def share(self, batch: Any) -> Any:
        if self.is_alone:
            return batch
        rows, world, rank = len(batch), self.world, self.rank
        return batch[slice(rank * rows // world, (rank + 1) * rows // world)]

    def freeze(self, role: Role) -> None:
        """Move a role that is not trained to the device, with the same precision as the trained ones."""
        role.model.requires_grad_(False)
        self._take(role)

    def shard_frozen(self, roles: Iterable[Role]) -> None:
        """Shard roles that are not trained, once everything that is copied from them has been made."""
        for role in roles if self.shard else ():
            shard(role, self.by_block)

    def train(self, name: str, role: Role, settings: OptimizerConfig, learning_rate: float) -> None:
        """Register a role to be trained with AdamW, fused where torch offers it."""
        if self.shard:
            trained_parameters(role.model)
            self._take(role)
            shard(role, self.by_block)
        optimizer = torch.optim.AdamW(
            decayed_groups(role.model, settings),
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.adopt(name, role, optimizer, settings)

    def adopt(
        self, name: str, role: Role, optimizer: torch.optim.Optimizer, settings: OptimizerConfig
    ) -> None:
        """Register a role with an optimizer made elsewhere."""
        if not is_sharded(role):
            self._take(role)
        role.module.eval()
        rates = [group["lr"] for group in optimizer.param_groups]
        self.trained[name] = Trained(role, self.accelerator.prepare_optimizer(optimizer), settings, rates)

    def _take(self, role: Role) -> None:
        """Move a role to the device. What roles share lies in memory once, also there.

        Not by accelerate's `prepare_model`: its list and the cycle of its wrapped forward keep a finished
        stage's model. Roles cast by themselves, and `update` sums gradients.
        """
        role.dtype = DTYPES[self.precision]
        if _between_forwards not in role.module._forward_pre_hooks.values():
            role.module.register_forward_pre_hook(_between_forwards)
        role.module.to(self.device)
        for model in models_of(role):
            computes_in(model, role.dtype, self.device)
            tie(model)
            if not self.shard:
                tie_alike(model)
        if not by_tree(role):
            kind = type(role.model).__name__
            self.say_once(f"{kind}: rows are padded, and sampled with transformers' cache: slower, as exact")

    def set_progress(self, step: int, steps: int) -> float:
        """Set every learning rate for a step (counted from 0); returns the factor."""
        factor = 1.0
        for trained in self.trained.values():
            factor = schedule_factor(trained.settings, step, steps)
            for group, rate in zip(trained.optimizer.param_groups, trained.learning_rates, strict=True):
                group["lr"] = rate * factor
        return factor

    def scaler_state(self) -> dict[str, Any]:
        """The fp16 gradient scaler's state, empty without one."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    @property
    def is_settling(self) -> bool:
        """Whether an fp16 scaler has skipped the last update of a role."""
        skipped = any(trained.skipped for trained in self.trained.values())
        return skipped and self.accelerator.scaler is not None

    def total(self, count: Tensor) -> Tensor:
        return self.accelerator.reduce(count, reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        if self.is_alone:
            return values
        plain = values.to(torch.uint8) if values.dtype == torch.bool else values
        shapes = self.accelerator.gather(torch.tensor([plain.shape], device=self.device))  # (processes, dims)
        missing = (shapes.amax(0) - torch.tensor(plain.shape, device=self.device)).tolist()
        padded = torch.nn.functional.pad(plain, [x for extra in missing[::-1] for x in (0, extra)])
        chunks = self.accelerator.gather(padded.contiguous()).chunk(len(shapes))
        rows = [chunk[:n] for chunk, n in zip(chunks, shapes[:, 0].tolist(), strict=True)]
        return torch.cat(rows).to(values.dtype)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Within `with`, an update computes its metrics and changes nothing."""
        self.measures = True
        try:
            yield
        finally:
            self.measures = False

    def update(self, role: str, batch: Any, weights: Tensor, loss: Callable[[Any], Loss]) -> Metrics:
        """One optimizer step (see `algorithms.base.Learner.update`)."""
        stopping_point("update")
        rows, trained = self._meet(len(batch)), self.trained[role]
        parameters = [] if self.is_alone or self.shard else list(trained.role.model.parameters())
        to_sum = [parameter for parameter in parameters if parameter.requires_grad]
        backward = partial(self._backward, trained, batch, weights, loss, max(rows))
        with torch.no_grad() if self.measures else contextlib.nullcontext():
            sums = self._fitting(trained, len(batch), backward)
        if min(rows) == 0:
            fill(to_sum, sums, self.gather_items)
            if (scaler := self.accelerator.scaler) is not None:
                scaler.scale(torch.zeros(1, device=self.device))  # it begins when it is first asked
        if self.measures:
            return self._reduced(sums, sum(rows))
        sum_gradients(to_sum)
        metrics = self._reduced(sums, sum(rows))
        metrics["grad_norm"] = self._step(role, trained, metrics)
        faultpoint("updated")
        return metrics

    def _meet(self, rows: int) -> list[int]:
        """Rows of each process. Interrupted if any was asked to stop: here, where all processes meet, and not
        before a forward pass of one.
        """
        if self.is_alone:
            return [rows]
        states = self.accelerator.gather(torch.tensor([[requested(), rows]], device=self.device)).tolist()
        if signal_number := max(state[0] for state in states):
            raise Interrupted(signal_number)
        return [state[1] for state in states]

    def _fitting(self, trained: Trained, rows: int, backward: Callable[[], Tally]) -> Tally:
        """`_backward`, again in microbatches of half the size whenever memory runs out.

        Only this process's gradients have changed by then, and the size is not in the mathematics: each
        process does this by itself; the others wait for it where gradients are summed.
        """
        while True:
            try:
                return backward()
            except torch.OutOfMemoryError:
                size = min(self.microbatch_size or rows, rows)
                if size == 1 or self.shard:  # the others wait in the middle of a pass
                    raise
            # Outside of `except`, where the error no longer keeps frames and tensors alive.
            self.microbatch_size = size // 2
            trained.optimizer.zero_grad(set_to_none=True)
            give_back_memory()
            self.say(f"warning: out of memory with {size} rows at a time; going on with {size // 2}")

    def _backward(
        self, trained: Trained, batch: Any, weights: Tensor, loss: Callable[[Any], Loss], most: int
    ) -> Tally:
        """This process's gradients of the whole minibatch, one microbatch after the other. If weights are
        sharded, every process makes as many passes as the one with the most rows, since all gather together.
        """
        trained.optimizer.zero_grad(set_to_none=True)
        sums = Tally()
        size = self.microbatch_size or max(most, 1)
        for start in range(0, most if self.shard else len(batch), size):
            rows = slice(start, start + size)
            out = loss(batch[rows])
            share = weights[rows][:, : out.terms.shape[1]] if out.terms.dim() == 2 else weights[rows]
            scalar = faultpoint("loss", weighted_sum(out.terms, share))
            if not self.measures:
                self.accelerator.backward(scalar)
            sums.add(scalar.detach(), out, share)
        return sums

    def _step(self, role: str, trained: Trained, metrics: Metrics) -> float:
        """Clip and step, unless a number is not finite: a NaN would spread through weights and moments.

        Returns the norm before clipping.
        """
        norm = self.accelerator.clip_grad_norm_(
            trained.role.model.parameters(), trained.settings.max_grad_norm
        )
        numbers = {**metrics, "grad_norm": math.nan if norm is None else number(norm)}
        wrong = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        scaler = self.accelerator.scaler
        overflowed = scaler is not None and "grad_norm" in wrong  # it lowers its scale and skips by itself
        if overflowed or not wrong:
            trained.optimizer.step()
            self.updates += not wrong  # a fused AdamW skips unseen by accelerate
        elif scaler is not None:
            scaler.update()  # it has unscaled gradients that are not used
        trained.skipped = trained.skipped + 1 if wrong else 0
        if wrong and (not overflowed or trained.skipped >= MAX_SCALED):
            self.not_finite.append(f"{role}: " + ", ".join(f"{n} {x}" for n, x in wrong.items()))
            trained.skipped = 0 if scaler is not None else trained.skipped  # all of these are one bad step
        trained.optimizer.zero_grad(set_to_none=True)
        return numbers["grad_norm"]

    def _reduced(self, sums: Tally, rows: float) -> Metrics:
        sums_here = [
            sums.weight.to(self.device),
            *(value.float().to(self.device) for value in sums.values.values()),
        ]
        weight, *values = self.total(torch.stack(sums_here)).tolist()  # one transfer
        scale = {"weight": max(weight, 1e-12), "rows": rows, "loss": 1.0}
        return {n: v / scale[sums.kinds[n]] for n, v in zip(sums.values, values, strict=True)}


def _between_forwards(*_: Any) -> None:
    """Before every forward pass of a role, training or not, a run may stop."""
    stopping_point("forward")


def _refuse_sharding() -> None:
    """ConfigError if the launcher asks accelerate to shard, which it ignores on CPUs: use `models.shards`."""
    for name in _SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(
                f"ACCELERATE_USE_{name} is set, and preftune does not shard models by accelerate",
                hint="unset it, and set parallel.shard=true (FSDP2), with torchrun as the launcher",
            )
