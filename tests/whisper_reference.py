"""Greedy search as transformers does it, one window at a time: what ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    WhisperTimeStampLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from transcribe.engines.whisper_decoding import Vocabulary
from transcribe.engines.whisper_tokens import LAST_FIRST_TIMESTAMP


@torch.inference_mode()
def greedy(
    model: Any, vocabulary: Vocabulary, output: Tensor, prompt: Sequence[int], n_new: int
) -> tuple[list[int], float, float]:
    """Ids without the end token, summed log-probability with it, no-speech probability."""
    rules = GenerationConfig(
        eos_token_id=vocabulary.end,
        no_timestamps_token_id=vocabulary.first_timestamp - 1,
        max_initial_timestamp_index=LAST_FIRST_TIMESTAMP,
    )
    made: Any = GenerationMixin.generate(
        model,
        encoder_outputs=BaseModelOutput(last_hidden_state=output[None]),
        attention_mask=torch.ones(1, len(output)),
        decoder_input_ids=torch.tensor([list(prompt)]),
        logits_processor=LogitsProcessorList(
            [WhisperTimeStampLogitsProcessor(rules, begin_index=len(prompt))]
        ),
        generation_config=GenerationConfig(
            max_new_tokens=n_new,
            do_sample=False,
            suppress_tokens=list(vocabulary.suppressed),
            eos_token_id=vocabulary.end,
            pad_token_id=vocabulary.end,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    ids = made.sequences[0, len(prompt) :].tolist()
    total = sum(step[0].log_softmax(-1).max().item() for step in made.scores)
    silent = first_logits(model, vocabulary, output).softmax(-1)[vocabulary.no_speech].item()
    return (ids[:-1] if ids[-1] == vocabulary.end else ids, total, silent)


@torch.inference_mode()
def first_logits(model: Any, vocabulary: Vocabulary, output: Tensor) -> Tensor:
    """What may follow the start token alone."""
    logits: Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=output[None]),
        decoder_input_ids=torch.tensor([[vocabulary.start]]),
    ).logits
    return logits[0, 0]
