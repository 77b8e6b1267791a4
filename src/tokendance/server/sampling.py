"""The sampling parameters of an answer, as a request says them."""

from tokendance.params import SamplingParams
from tokendance.server.errors import bad_request
from tokendance.server.protocol import ChatRequest, CompletionRequest, PromptRequest, Sampling
from tokendance.server.settings import ServerSettings


def sampling_params(
    body: Sampling, settings: ServerSettings, vocab_size: int, choice: int = 0
) -> SamplingParams:
    """Sampling parameters of an answer, the one of index `choice` of `n`; OpenAI's defaults.

    Raises:
        ApiError: naming the field.
    """
    top_logprobs = None
    prompt_logprobs = body.prompt_logprobs if isinstance(body, PromptRequest) else None
    if prompt_logprobs is not None and body.stream:
        raise bad_request("prompt_logprobs goes without stream.", "prompt_logprobs")
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs goes with logprobs: true.", "top_logprobs")
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, CompletionRequest):
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad_request("best_of is not supported. Use n.", "best_of")
        top_logprobs = body.logprobs
        if body.echo and body.logprobs is not None:
            prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    stop = (body.stop,) if body.stop and isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not text for text in stop):
        raise bad_request("A stop text is empty.", "stop")
    ends = tuple(body.stop_token_ids or ())
    if any(not 0 <= token < vocab_size for token in ends):
        raise bad_request("stop_token_ids has what is no token id.", "stop_token_ids")
    max_tokens = body.max_tokens_asked
    if max_tokens is None:
        max_tokens = settings.default_max_tokens
    if body.max_tokens_asked is not None and (body.min_tokens or 0) > max_tokens:
        raise bad_request("min_tokens is more than max_tokens.", "min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else (body.seed + choice) % 2**63,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        stop=stop,
        stop_token_ids=ends,
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(body, vocab_size),
    )


def _logit_bias(body: Sampling, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    for key, bias in (body.logit_bias or {}).items():
        if not key.isdecimal() or len(key) > 9 or int(key) >= vocab_size:
            raise bad_request(f"logit_bias names {key[:20]!r}, no token id.", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request("A logit_bias lies between -100 and 100.", "logit_bias")
        biases.append((int(key), bias))
    return tuple(biases)
