"""vLLM in the trainer's process, and the weight transfer to vLLM wherever it runs.

`SyncedVLLM` adds to TRL's `VLLMGeneration` what that lacks on some platforms. It relies on these internals of
TRL and vLLM: `VLLMGeneration._init_vllm`, `sync_weights` and `_iter_named_params`, `LLM.llm_engine`, and the
model runner's `reload_weights`.
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
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from trl.generation import vllm_generation

from rlkit.errors import UserError
from rlkit.models.merged import merged_parameters
from rlkit.models.patches import vllm_settings
from rlkit.rollouts.types import Engine, Request, Sample, Sampling
from rlkit.rollouts.vllm.endpoint import as_sample, sampling_params, server_settings
from rlkit.rollouts.vllm.installed import check_installed, set_cpu_defaults
from rlkit.rollouts.vllm.server_engine import ServerEngine
from rlkit.rollouts.vllm.worker import repack_tied

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput


class SyncedVLLM(vllm_generation.VLLMGeneration):
    """TRL's vLLM generation with weight transfer on every platform, and an engine that samples turns.

    In mode "server", each rank sends its own requests to the servers, and the main process pushes weights.

    Args:
        model: Model to train.
        args: Other positional arguments of `VLLMGeneration`.
        weights_dir: Directory through which servers on other machines get their weights.
        kwargs: Keyword arguments of `VLLMGeneration`. `server_base_url` may list several URLs, separated by
            commas.

    Raises:
        UserError: vLLM cannot hold the weights of the model.

    Attributes:
        sync_bytes: Size of the last weight transfer in bytes.
    """

    sync_bytes = 0

    def __init__(self, model: Any, *args: Any, weights_dir: str | None = None, **kwargs: Any):
        check_adapter(model)
        self.weights_dir = weights_dir
        self._num_syncs = 0
        super().__init__(model, *args, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode == "server":
            host = "127.0.0.1" if self.server_host == "0.0.0.0" else self.server_host  # TRL's default
            urls = self.server_base_url or f"http://{host}:{self.server_port}"
            self._servers = ServerEngine(
                [url.strip() for url in urls.split(",")],
                weights_dir=self.weights_dir,
                retry_timeout=self.server_timeout,
            )
            self._engine: Engine = self._servers
            self.vllm_client = self  # type: ignore[assignment]  # TRL calls its `get_server_info`
            # Read the settings now, while all servers are up.
            self._accepts_adapters = all(server_settings(url)["lora_config"] for url in self._servers.urls)
            return
        check_installed()
        if self.tensor_parallel_size > 1:
            raise UserError(
                f"vllm_tensor_parallel_size {self.tensor_parallel_size} requires a server: start it with "
                f"`rlkit serve MODEL --tensor_parallel_size {self.tensor_parallel_size}`, and set "
                "vllm_mode: server"
            )
        self._start_in_process()

    def _start_in_process(self) -> None:
        settings: dict[str, Any] = {"dtype": self._dtype()}
        if not torch.cuda.is_available():
            set_cpu_defaults(os.environ, shares_process=True)
            settings["enforce_eager"] = True  # compilation takes minutes and needs a C++ compiler
        with vllm_settings(**settings):
            super()._init_vllm()
        self._engine = InProcessEngine(self.llm.llm_engine)

    def _dtype(self) -> str:
        """Return the dtype that the trainer computes in. vLLM's default converts float32 to 16 bits."""
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        return mixed or str(self.model.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Shut the engine down. This cannot wait for interpreter exit, when its process groups are gone."""
        if self.mode == "server":
            self._servers.close()
        else:
            self.llm.llm_engine.engine_core.shutdown()

    def get_server_info(self) -> dict[str, Any]:
        """Return the vLLM settings of the first server."""
        return server_settings(self._servers.urls[0])

    def sync_weights(self) -> None:
        """Send the trainer's weights to vLLM, and drop its prefix cache, computed with the old weights."""
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
        """Push the weights to the servers, or only the LoRA adapter if the servers accept adapters."""
        self._num_syncs += 1
        adapter = self._sends_adapter()
        if self.accelerator.is_main_process:
            if adapter:
                with tempfile.TemporaryDirectory() as folder:
                    self.model.save_pretrained(folder)
                    self._servers.push_adapter(folder, str(self._num_syncs))
            else:
                self._servers.push(self._iter_named_params(), str(self._num_syncs))
        elif not adapter:
            # Gathering sharded parameters is a collective operation, so all ranks must take part.
            for _ in self._iter_named_params():
                pass
        self._servers.weights = broadcast_object_list([self._servers.weights])[0]
        self.sync_bytes = self._servers.pushed_bytes

    def _sends_adapter(self) -> bool:
        """Return whether the adapter holds all trained weights, unsharded, and the servers accept it."""
        if not isinstance(self.model, PeftModel) or self._dist.is_fsdp or self._dist.is_zero3:
            return False
        return self._accepts_adapters and all(map(is_low_rank, self.model.peft_config.values()))

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        named_parameters = super()._iter_named_params()
        if isinstance(self.model, PeftModel) and not (self._dist.is_fsdp and self._dist.fsdp_version == 1):
            named_parameters = (
                (self._fix_param_name_to_vllm(name), weight)
                for name, weight in merged_parameters(self.model, self._dist.gather_params)
            )
        for name, weight in named_parameters:
            self.sync_bytes += weight.nbytes
            yield name, weight

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Yield the engine, woken from sleep mode for the duration of the context."""
        if self.mode == "server":
            yield self._engine
            return
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        yield self._engine
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)  # this level discards the weights, which are synced again before use
            self._llm_weights_sleeping = True


def check_adapter(model: nn.Module) -> None:
    """Raise UserError if an adapter gives tied embeddings different weights, which vLLM would keep tied."""
    if not isinstance(model, PeftModel) or not model.config.tie_word_embeddings:
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            raise UserError(
                "the input and output embeddings of the model are tied, and vLLM keeps them tied; remove "
                "them from lora_target_modules and lora_modules_to_save, or set use_vllm to false"
            )


def is_low_rank(config: PeftConfig) -> bool:
    """Return whether vLLM can load an adapter: it supports only low-rank updates of modules."""
    return not any(getattr(config, key, None) for key in ("modules_to_save", "use_dora", "target_parameters"))


def is_repacked(model: torch.nn.Module) -> bool:
    """Return whether vLLM has repacked linear weights for its kernels, so that it reloads layer by layer."""
    weights = [m.weight for m in model.modules() if hasattr(m, "quant_method") and hasattr(m, "weight")]
    return not all(hasattr(weight, "weight_loader") for weight in weights)


class InProcessEngine:
    """Samples turns with vLLM in this process; each turn is returned as soon as it finishes.

    Args:
        engine: vLLM's engine.
    """

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.context: int | None = engine.model_config.max_model_len
        self._request_ids = map(str, itertools.count())
        self._rows: dict[str, int] = {}  # local index of each outstanding request, by request id

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Add requests to vLLM's queue."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        for request in requests:
            request_id = next(self._request_ids)
            self._rows[request_id] = request.local_index
            settings = sampling_params(request, sampling) | {"output_kind": RequestOutputKind.FINAL_ONLY}
            if "structured_outputs" in settings:
                settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
            prompt = {"prompt_token_ids": list(request.ids)}
            self.engine.add_request(request_id, prompt, SamplingParams(**settings))  # type: ignore[arg-type]

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Run one engine step, which adds a token to each turn; with `wait`, repeat until a turn finishes."""
        while True:
            finished: list[tuple[int, Sample]] = []
            for output in self.engine.step():
                if output.finished:
                    row = self._rows.pop(output.request_id)
                    finished.append((row, read_output(output.outputs[0])))  # type: ignore[index]
            if finished or not wait or not self._rows:
                return finished


def read_output(output: CompletionOutput) -> Sample:
    """Convert a finished output of vLLM to a sample."""
    steps: list[dict[int, Logprob]] = output.logprobs  # type: ignore[assignment]
    log_probs = (step[token].logprob for token, step in zip(output.token_ids, steps, strict=True))
    return as_sample(output.token_ids, log_probs, output.finish_reason, output.stop_reason)
