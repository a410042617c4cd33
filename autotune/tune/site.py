"""What the tuner needs to know of job and data to have a ladder probed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from autotune.emit import BETWEEN_STEPS_NOTHING, ds_config, train_spec, without_overflow
from autotune.hardware import Cluster
from autotune.outcome import Measured
from autotune.probe.plan import RungPlanner
from autotune.probe.protocol import ProbeRequest, RungMeasurement, RungPlan
from autotune.setting import RANDOM, Setting
from autotune.throughput import (
    DrawnRows,
    Floats,
    Ints,
    Rebalanced,
    integrate,
    synchronises_every_micro_step,
)
from autotune.workload import Job, ModelProfile


class JobSite:
    """A job on a cluster, with the lengths of its rows."""

    def __init__(
        self,
        *,
        job: Job,
        cluster: Cluster,
        profile: ModelProfile,
        lengths_of_rows: Ints,
        dataset_dir: Path,
        scratch_dir: Path,
        total_steps: int,
        rebalanced: Mapping[int, Rebalanced] | None = None,
    ) -> None:
        self.job = job
        self.cluster = cluster
        self.profile = profile
        self.dataset_dir = dataset_dir
        self.scratch_dir = scratch_dir
        self.total_steps = total_steps
        self._rows = DrawnRows.draw(lengths_of_rows, job.seed, rebalanced)
        # How work grows with rows and lengths is about the same however a pass is computed.
        self._planner = RungPlanner(self._rows, profile.traces[0][1].flops)

    def request(self, ladder: Sequence[Setting]) -> ProbeRequest:
        first = ladder[0]
        spec = train_spec(
            self.job,
            first,
            self.cluster,
            dataset_dir=str(self.dataset_dir),
            output_dir=str(self.scratch_dir),
            model_output_dir=str(self.scratch_dir),
        )
        return ProbeRequest(
            label=first.structure.label(),
            ranks=self.cluster.num_devices,
            # A probe steps by itself, so what the Trainer would do between steps is left out.
            spec=replace(spec, trainer=spec.trainer | BETWEEN_STEPS_NOTHING),
            ds_config=without_overflow(ds_config(self.job, first, self.profile, self.cluster)),
            total_steps=self.total_steps,
            rungs=tuple(map(self._rung, ladder)),
        )

    def _rung(self, setting: Setting) -> RungPlan:
        return self._planner.plan(setting)

    def _timed_sizes(self, setting: Setting) -> int | Ints:
        """Return how many rows the micro-batches have that are timed, each if they differ."""
        if setting.structure.sampling == RANDOM:
            return setting.micro_batch_size
        return np.array([len(rows) for _, rows in self._rung(setting).timed_rows])

    def lengths(self, setting: Setting) -> dict[str, object]:
        """Return the lengths that the rung of a setting is tried on."""
        timed = [length for length, _ in self._rung(setting).timed_rows]
        return {"longest": int(self._rows.lengths.max()), "timed": timed}

    def outcome(self, setting: Setting, measured: RungMeasurement) -> Measured:
        """Compose the step time of the real length distribution from the rung's micro-steps."""
        timed = [(length, float(np.median(times))) for length, times in measured.accumulate_s]
        lengths, seconds = (np.array(column) for column in zip(*timed, strict=True))
        work = self._planner.work(self._timed_sizes(setting), lengths)

        def micro_step_s(sizes: Ints, padded: Ints) -> Floats:
            interpolated: Floats = np.interp(self._planner.work(sizes, padded), work, seconds)
            return interpolated

        # Updates are timed on the rows in the middle.
        boundary_extra_s = max(
            (
                float(np.median(times)) - float(seconds[len(seconds) // 2])
                for _, times in measured.boundary_s
            ),
            default=0.0,
        )
        rate = integrate(
            self._rows,
            micro_batch_size=setting.micro_batch_size,
            gradient_accumulation_steps=setting.gradient_accumulation_steps,
            ranks=self.cluster.num_devices,
            micro_step_s=micro_step_s,
            boundary_extra_s=max(0.0, boundary_extra_s),
            synchronises_every_micro_step=synchronises_every_micro_step(
                setting.structure.zero_stage, self.cluster.num_devices
            ),
            sampling=setting.structure.sampling,
        )
        return Measured(
            step_time_s=rate.step_time_s,
            samples_per_s=rate.samples_per_s,
            tokens_per_s=rate.tokens_per_s,
            accumulate_s=tuple(timed),
            boundary_extra_s=max(0.0, boundary_extra_s),
            spread=max(_relative_deviation(times) for _, times in measured.accumulate_s),
            peak_bytes=measured.peak_bytes,
            allocated_bytes=measured.allocated_bytes,
            device_used_bytes=measured.device_used_bytes,
        )


def _relative_deviation(times: tuple[float, ...]) -> float:
    """Return the median absolute deviation over the median."""
    median = float(np.median(times))
    return float(np.median(np.abs(np.array(times) - median))) / median
