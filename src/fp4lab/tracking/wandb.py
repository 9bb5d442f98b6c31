"""wandb as a view of the records, offline by default, in a thread of its own so that it never slows a run.

One wandb run a job, as a context manager: a run left open would take in the next job's data.
"""

import queue
import threading
from pathlib import Path
from typing import Any

from fp4lab.events import STATUSES
from fp4lab.tracking.base import Record

JOIN_S = 10.0
_MEMORY = (
    "torch_allocated_mib",
    "torch_peak_mib",
    "cuda_used_mib",
    "pid_mem_mib",
    "proc_rss_mib",
    "proc_peak_rss_mib",
    "mem_available_mib",
    "cgroup_mib",
)

_TURN = ("n", "first_token_ms", "ms_per_token", "context_tokens", "cache_len", "cache_mib", "nll", "repetition", "path")


class WandbTracker:
    """`folder` holds the wandb directory; `config` is the resolved configuration."""

    def __init__(self, folder: Path, name: str, group: str | None, tags: list[str], config: dict[str, Any]):
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._failed: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "project": config["tracker"]["project"],
            "mode": config["tracker"]["name"],
            "dir": str(folder),
            "name": name,
            "group": group,
            "job_type": config["task"]["name"],
            "tags": tags,
            "config": config,
        }
        self._thread = threading.Thread(target=self._work, args=(options,), name="wandb", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Raises what wandb raised, once the thread has met it."""
        self._raise()
        self._records.put(record)

    def close(self, end: Record) -> None:
        self._records.put(None)
        self._thread.join(JOIN_S)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"wandb did not finish within {JOIN_S:g} s")

    def _raise(self) -> None:
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error

    def _work(self, options: dict[str, Any]) -> None:
        try:
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                x_save_requirements=False,
                disable_git=True,
                save_code=False,
                disable_code=True,
                x_transaction_log_flush_interval=1,
            )
            with wandb.init(**options, settings=settings, reinit="create_new") as run:
                run.define_metric("phase/*", step_metric="phase/index")
                run.define_metric("loss/*", step_metric="loss/step")
                run.define_metric("turn/*", step_metric="turn/n")
                status = "failed"
                table = wandb.Table(columns=["when", "path", "rank", "id", "logit", "text"])
                phases = 0
                while (record := self._records.get()) is not None:
                    kind = record["kind"]
                    if kind == "phase":
                        run.log(_phase(record, phases))
                        phases += 1
                    elif kind == "loss":
                        run.log(_loss(record))
                    elif kind == "turn":
                        run.log({f"turn/{k}": record[k] for k in _TURN if record[k] is not None})
                    elif kind == "first_token":
                        for rank, (token, logit, text) in enumerate(record["top10"]):
                            table.add_data(record["when"], record["path"], rank, token, logit, text)
                    elif kind == "first_token_diff":
                        run.summary[f"first_token/{record['when']}/{record['pair']}/kl"] = record["kl"]
                        run.summary[f"first_token/{record['when']}/{record['pair']}/fault"] = record["fault"]
                        run.summary[f"first_token/{record['when']}/{record['pair']}/top1_equal"] = record["top1_equal"]
                    elif kind == "end":
                        status = record["status"]
                        run.summary["status"] = status
                        run.summary["reason"] = record["reason"]
                if table.data:
                    run.log({"first_token": table})
                run.finish(exit_code=STATUSES[status])
        except Exception as e:
            self._failed = e


def _phase(r: Record, index: int) -> dict[str, Any]:
    values = {f"phase/{k}": r[k] for k in _MEMORY if r.get(k) is not None}
    return {"phase/index": index, "phase/name": r["name"], "phase/ms": r["ms"], **values}


def _loss(r: Record) -> dict[str, Any]:
    values = {f"loss/{k}": r[k] for k in ("grad_norm", "lr", "ms") if r.get(k) is not None}
    return {"loss/step": r["step"], f"loss/{r['split']}": r["loss"], **values}
