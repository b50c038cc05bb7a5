"""The entries that `generation_kwargs` may have: a table of all settings of transformers and vLLM.

The loss assumes that completions are sampled from the model at `temperature`, and that they end at an EOS
token, a stop string or a limit. An engine follows every entry of `generation_kwargs` without telling the
loss, so almost all of them are rejected. The names are those of transformers' `GenerationConfig` (the
transformers engine and TRL), of vLLM's `SamplingParams` (vLLM in the trainer's process) and of its
`CompletionRequest` (vLLM servers). `tests/rlkit/arguments/test_generation.py` asserts that the table has
every name of the installed versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.errors import UserError, check_integer, nearest

# The one setting that each engine accepts. Until a turn has this number of tokens, EOS tokens have
# probability 0. That changes the distribution, too, as `top_p` does, and `presets.warnings_for` warns about
# it. It is accepted because benchmarks need completions of equal length.
MIN_TOKENS = {"transformers": "min_new_tokens", "vllm": "min_tokens"}
LIBRARIES = {"transformers": "transformers' GenerationConfig", "vllm": "vLLM's SamplingParams"}

# Settings with a key of their own, and what to use instead.
REPLACEMENTS: dict[str, str] = {
    # vLLM would sample all completions of a prompt with the same seed, so that they would be equal.
    "seed": "the key `seed`",
    "temperature": "the key `temperature`",
    "top_p": "the key `top_p`",
    "top_k": "the key `top_k`",
    "min_p": "the key `min_p`",
    "repetition_penalty": "the key `repetition_penalty`",
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), "`max_completion_length`"),
    **dict.fromkeys(("stop", "stop_strings"), "the attribute `stop` of the environment"),
    **dict.fromkeys(("structured_outputs", "response_format"), "`vllm_structured_outputs_regex`"),
    **dict.fromkeys(("n", "num_return_sequences"), "`num_generations`"),
    "continuous_batching_config": "`transformers_continuous_batching_config`",
    "model": "`model_name_or_path`",
}

DISTRIBUTION = (
    "completions would be sampled from another distribution than the loss assumes, whose log-probabilities "
    "are those of the model at `temperature`"
)
END = (
    "completions would end where the loss expects no end; they end only at EOS tokens, at the environment's "
    "`stop` and at `max_completion_length`"
)
DECODING = "it belongs to beam search or another decoding method, but the loss assumes plain sampling"
CACHE = "rlkit manages the engine's cache and compilation, and this would disturb them"
OUTPUT = "rlkit reads token ids and log-probabilities in the format that it requests from the engine"
INPUT = "rlkit sets the prompts, their padding and the ids of requests"
NO_EFFECT = "it has no effect on the rollouts"

_REJECTED: dict[str, tuple[str, ...]] = {
    DISTRIBUTION: (
        # transformers
        "do_sample", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits",
        "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
        "guidance_scale", "watermarking_config", "logits_processor", "prefix_allowed_tokens_fn",
        # vLLM
        "presence_penalty", "frequency_penalty", "watermarking", "logit_bias", "allowed_token_ids",
        "bad_words", "extra_args", "vllm_xargs", "thinking_token_budget", "trace_decode_token_ids",
        "logits_processors",
    ),
    END: (
        # After `max_time` seconds, transformers returns completions that have not ended.
        "eos_token_id", "max_time", "stopping_criteria", "stop_token_ids", "ignore_eos",
        "repetition_detection",
    ),
    DECODING: (
        "num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty",
        "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "low_memory", "use_mtp",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type", "use_beam_search",
    ),
    CACHE: (
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
        "compile_config",
        "disable_compile", "skip_reading_prefix_cache", "cache_salt", "kv_transfer_params",
        "ec_transfer_params",
    ),
    OUTPUT: (
        "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "return_dict_in_generate", "logprobs", "prompt_logprobs", "prompt_logprob_token_ids",
        "prompt_logprob_start", "logprob_token_ids", "flat_logprobs", "detokenize", "skip_special_tokens",
        "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind",
        "routed_experts_prompt_start", "echo", "stream", "stream_options", "suffix",
        "return_tokens_as_token_ids", "return_token_ids", "return_token_offsets",
    ),
    INPUT: (
        "pad_token_id", "bos_token_id", "decoder_start_token_id", "token_healing", "prompt",
        "prompt_embeds", "truncate_prompt_tokens", "truncation_side", "add_special_tokens", "request_id",
        "session_id", "priority",
    ),
    NO_EFFECT: (
        "transformers_version", "output_text_buffer_length", "skip_clone", "stream_interval", "user",
    ),
}  # fmt: skip
REASONS: dict[str, str] = {name: reason for reason, names in _REJECTED.items() for name in names}

# `min_length` of transformers counts the prompt and its padding.
LOWER_LIMITS = (*MIN_TOKENS.values(), "min_length")
NAMES = (*REPLACEMENTS, *REASONS, *LOWER_LIMITS)


def check_generation_kwargs(
    settings: Mapping[str, object],
    *,
    use_vllm: bool,
    continuous_batching: bool = False,
    max_tokens: int | None = None,
    max_turns: int | None = None,
) -> None:
    """Raise UserError for the first entry of `generation_kwargs` that cannot be used for training.

    Args:
        settings: Value of the key `generation_kwargs`.
        use_vllm: Value of the key `use_vllm`.
        continuous_batching: Value of the key `use_transformers_continuous_batching`.
        max_tokens: Maximum number of tokens of a turn, or None if it is not known yet.
        max_turns: Maximum number of turns of a rollout, or None if it is not known yet.

    Raises:
        UserError: A name is unknown, has a key of its own or is not supported, or a value is invalid.
    """
    engine = "vllm" if use_vllm else "transformers"
    accepted = MIN_TOKENS[engine]
    for name, value in settings.items():
        prefix = f"generation_kwargs must not contain `{name}`"
        if name in REPLACEMENTS:
            raise UserError(f"{prefix}; use {REPLACEMENTS[name]}")
        if name in REASONS:
            raise UserError(f"{prefix}: {REASONS[name]}; remove it")
        if name not in LOWER_LIMITS:
            hint = nearest(name, NAMES) or f" (choices: {accepted})"
            raise UserError(
                f"generation_kwargs must contain names of {LIBRARIES[engine]}, not {name!r}{hint}"
            )
        if name != accepted:
            raise UserError(f"{prefix} with use_vllm: {str(use_vllm).lower()}; use `{accepted}`")
        if continuous_batching and not use_vllm:
            raise UserError(
                f"{prefix}: continuous batching of transformers ignores it; remove it, or set "
                "use_transformers_continuous_batching: false"
            )
        if use_vllm and max_turns is not None and max_turns > 1:
            raise UserError(
                f"{prefix} if rollouts have several turns: vLLM fails at a turn that has fewer tokens left; "
                "remove it"
            )
        check_integer(f"generation_kwargs.{name}", value, 0, max_tokens)  # type: ignore[arg-type]
