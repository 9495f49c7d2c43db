# SPDX-License-Identifier: Apache-2.0
"""Fields of vLLM's ``SamplingParams`` with their whole state in the parameters, the tokens and the runner's export.

A grammar's state is replayed from the tokens (``compat/grammars.py``).
"""

MOVED = frozenset(
    [
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking", "top_p"),
        *("top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
        *("max_tokens", "min_tokens", "logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
        *(
            "include_stop_str_in_output",
            "output_kind",
            "stream_interval",
            "skip_clone",
            "output_text_buffer_length",
            "_eos_token_id",
        ),
        *("_all_stop_token_ids", "logit_bias", "allowed_token_ids", "extra_args", "bad_words", "_bad_words_token_ids"),
        *("skip_reading_prefix_cache", "structured_outputs", "repetition_detection"),
    ]
)
