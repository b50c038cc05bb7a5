"""vLLM in the trainer's process, or as a server: what TRL's `VLLMGeneration` lacks on some platforms.

The seams of TRL and vLLM that this stands on: `VLLMGeneration._init_vllm`, `sync_weights` and
`_iter_named_params`, `LLM.llm_engine`, and the model runner's `reload_weights`.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from trl.generation import vllm_generation

from rlkit.errors import UserError
from rlkit.models.patches import vllm_settings
from rlkit.rollouts.types import Engine, Request, Sample, Sampling
from rlkit.rollouts.vllm.endpoint import as_sample, settings_of, started_with
from rlkit.rollouts.vllm.installed import check_installed, set_cpu_defaults
from rlkit.rollouts.vllm.server_engine import ServerEngine
from rlkit.rollouts.vllm.worker import repack_tied

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput


class SyncedVLLM(vllm_generation.VLLMGeneration):
    """TRL's vLLM with weights that arrive on every platform, and turns that are sampled one by one.

    In the mode "server" each rank talks with the servers by itself, and the main process gives them weights.

    Args:
        weights_dir: where weights lie on their way to servers on other machines.
        further: those of TRL's `VLLMGeneration`; `server_base_url` may be several, with commas.

    Attributes:
        sync_bytes: how much the last transfer of weights was.
    """

    sync_bytes = 0

    def __init__(self, *args: Any, weights_dir: str | None = None, **further: Any):
        self.weights_dir = weights_dir
        self._syncs = 0
        super().__init__(*args, **further)

    def _init_vllm(self) -> None:
        if self.mode == "server":
            host = "127.0.0.1" if self.server_host == "0.0.0.0" else self.server_host  # TRL's default
            urls = self.server_base_url or f"http://{host}:{self.server_port}"
            self._servers = ServerEngine(
                [url.strip() for url in urls.split(",")],
                weights_dir=self.weights_dir,
                patience=self.server_timeout,
            )
            self._engine: Engine = self._servers
            self.vllm_client = self  # type: ignore[assignment]  # TRL asks it for the server's settings
            # Asked now, while all are up.
            self._takes_adapters = all(started_with(url)["lora_config"] for url in self._servers.urls)
            return
        check_installed()
        if self.tensor_parallel_size > 1:
            raise UserError(
                "vllm_tensor_parallel_size above 1 needs a server: rlkit serve MODEL --tensor_parallel_size "
                f"{self.tensor_parallel_size}, and vllm_mode: server"
            )
        self._start_in_process()

    def _start_in_process(self) -> None:
        settings: dict[str, Any] = {"dtype": self._dtype()}
        if not torch.cuda.is_available():
            set_cpu_defaults(os.environ, shares_process=True)
            settings["enforce_eager"] = True  # compiling takes minutes and a C++ compiler
        with vllm_settings(**settings):
            super()._init_vllm()
        self._engine = InProcessEngine(self.llm.llm_engine)

    def _dtype(self) -> str:
        """That of the trainer's arithmetic; vLLM by itself would halve float32."""
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        return mixed or str(self.model.dtype).removeprefix("torch.")

    def close(self) -> None:
        """End the engine; later, when Python ends, it would miss its process groups."""
        if self.mode == "server":
            self._servers.close()
        else:
            self.llm.llm_engine.engine_core.shutdown()

    def get_server_info(self) -> dict[str, Any]:
        """The settings of the first server."""
        return started_with(self._servers.urls[0])

    def sync_weights(self) -> None:
        """Give the sampler the trainer's weights, and make it forget what it computed with the old ones."""
        if self.mode == "server":
            self._push()
            return
        self.sync_bytes = 0
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        if is_repacked(runner.get_model()):
            runner.reload_weights(weights_iterator=self._iter_named_params(), is_checkpoint_format=True)
            repack_tied(runner.get_model())
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()

    def _push(self) -> None:
        """Give the servers the weights, or of a LoRA model the adapter alone where they take one."""
        self._syncs += 1
        adapter = self._sends_adapter()
        if self.accelerator.is_main_process:
            if adapter:
                with tempfile.TemporaryDirectory() as folder:
                    self.model.save_pretrained(folder)
                    self._servers.push_adapter(folder, str(self._syncs))
            else:
                self._servers.push(self._iter_named_params(), str(self._syncs))
        elif not adapter:
            for _ in self._iter_named_params():  # gathering sharded ones takes all ranks
                pass
        self._servers.weights = broadcast_object_list([self._servers.weights])[0]
        self.sync_bytes = self._servers.pushed_bytes

    def _sends_adapter(self) -> bool:
        if not isinstance(self.model, PeftModel) or self._dist.is_fsdp or self._dist.is_zero3:
            return False
        trained = [getattr(config, "modules_to_save", None) for config in self.model.peft_config.values()]
        return self._takes_adapters and not any(trained)

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in super()._iter_named_params():
            self.sync_bytes += weight.nbytes
            yield name, weight

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """The engine, awake."""
        if self.mode == "server":
            yield self._engine
            return
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        yield self._engine
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True


def is_repacked(model: torch.nn.Module) -> bool:
    """Whether vLLM has rewritten linear weights for its kernels, so that they are loaded layer by layer."""
    weights = [m.weight for m in model.modules() if hasattr(m, "quant_method") and hasattr(m, "weight")]
    return not all(hasattr(weight, "weight_loader") for weight in weights)


class InProcessEngine:
    """Samples turns with a vLLM engine of this process; a finished one does not wait for the others.

    Args:
        engine: vLLM's `LLMEngine`.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.context: int | None = engine.model_config.max_model_len
        self._names = map(str, itertools.count())
        self._rows: dict[str, int] = {}

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue requests."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        for request in requests:
            name = next(self._names)
            self._rows[name] = request.row
            settings = settings_of(request, sampling) | {"output_kind": RequestOutputKind.FINAL_ONLY}
            if "structured_outputs" in settings:
                settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
            prompt = {"prompt_token_ids": list(request.ids)}
            self.engine.add_request(name, prompt, SamplingParams(**settings))  # type: ignore[arg-type]

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Compute one token for every turn, with `wait` more until one has finished; return the finished."""
        while True:
            outputs = [output for output in self.engine.step() if output.finished]
            finished = [
                (self._rows.pop(output.request_id), read(output.outputs[0]))  # type: ignore[index]
                for output in outputs
            ]
            if finished or not wait or not self._rows:
                return finished


def read(output: CompletionOutput) -> Sample:
    """What vLLM sampled."""
    steps: list[dict[int, Logprob]] = output.logprobs  # type: ignore[assignment]
    log_probs = (step[token].logprob for token, step in zip(output.token_ids, steps, strict=True))
    return as_sample(output.token_ids, log_probs, output.finish_reason, output.stop_reason)
