"""Text and chat messages through a real tokenizer, with its chat template and without."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_fipo.data.encoding import encoder, load_tokenizer
from megatron_fipo.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)
MESSAGES = (("system", "be brief"), ("user", "one"))


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<bos>", "<eos>", "<", ">", "system", "user", "me", "be", "brief", "one"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, bos_token="<bos>", eos_token="<eos>")


def test_messages_go_through_the_template_and_text_does_not(tokenizer):
    encode = encoder(tokenizer)
    assert tokenizer.decode(encode(MESSAGES)) == "< system > be brief < user > one < me >"
    assert tokenizer.decode(encode("one")) == "<bos> one"


def test_the_template_can_be_forced_or_forbidden(tokenizer):
    assert tokenizer.decode(encoder(tokenizer, True)("one")) == "< user > one < me >"
    assert tokenizer.decode(encoder(tokenizer, False)(MESSAGES)) == "<bos> be brief one"


def test_a_missing_template_is_named_with_the_way_around_it(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert encoder(bare)("one")
    with pytest.raises(UserError, match="no chat template; .* --no-apply-chat-template"):
        encoder(bare)(MESSAGES)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))
