from __future__ import annotations

from danube_ray.data.chat import render
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.chat import answer
from danube_ray.inference.gguf import GgufModel
from danube_ray.inference.huggingface import HuggingFaceModel

MESSAGES = [{"role": "user", "content": "Which river is longer?"}]


def test_the_answer_is_the_decoded_generation_on_either_engine(model_folder, gguf_file):
    tokenizer = Tokenizer.load(model_folder)
    prompt, _ = render(MESSAGES, tokenizer, add_generation_prompt=True)
    with GgufModel(gguf_file) as llama_cpp:
        for model in (llama_cpp, HuggingFaceModel(model_folder)):
            expected = tokenizer.decode(model.generate(prompt, 12, repetition_penalty=1.1))
            assert expected
            assert answer(model, tokenizer, MESSAGES, max_tokens=12) == expected
