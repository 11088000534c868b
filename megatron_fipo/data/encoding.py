"""Prompts to token ids: the model's tokenizer, with its chat template or without."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_fipo.data.layouts import Encode, Messages
from megatron_fipo.errors import UserError


def load_tokenizer(hf_model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises UserError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(hf_model, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise UserError(
            f"--hf-model {hf_model}: the tokenizer cannot be read ({error}); copy its files again"
        ) from error


def encoder(tokenizer: PreTrainedTokenizerBase, chat_template: bool | None = None) -> Encode:
    """Encode text or chat messages.

    With ``chat_template`` text is a user's message; without it messages are joined by blank lines. None: messages go
    through the template, text does not. The encoding raises UserError if a template is needed and there is none, and
    for text that the tokenizer has no tokens for.
    """

    def encode(prompt: str | Messages) -> list[int]:
        is_text = isinstance(prompt, str)
        if chat_template is False or (chat_template is None and is_text):
            text = prompt if isinstance(prompt, str) else "\n\n".join(content for _, content in prompt)
            return to_ids(text, special=True)
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer of --hf-model has no chat template; add chat_template to tokenizer_config.json, or pass "
                "--no-apply-chat-template to join the messages as text"
            )
        messages = (("user", prompt),) if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True,
            tokenize=False,
        )
        return to_ids(text, special=False)  # the template writes what is special

    def to_ids(text: str, *, special: bool) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # of Rust, without a class of its own
            raise UserError(
                f"the tokenizer of --hf-model cannot encode the prompt {text[:80]!r} ({error}); give data that it was "
                f"made for, or another model"
            ) from error

    return encode
