"""A limit, stated as a test: masks do not help against a provider that chooses the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import tiny
from symbiosis import Executor, connect

SECRET, END = 17, 2


def test_a_head_of_the_providers_choice_tells_the_prompt_by_its_end(
    serve: Callable[..., tuple[Executor, str]],
) -> None:
    """Assumption A4: the text ends at once if the prompt's last token is the one that is sought,
    and whoever counts exchanges sees that. Must succeed, as the other controls."""
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = F.normalize(model.model.embed_tokens.weight * model.model.norm.weight, dim=1)
        model.lm_head.weight.copy_(directions)  # each token is followed by itself
        model.lm_head.weight[END] = directions[SECRET]  # but this one
        model.lm_head.weight[SECRET] = 0
    _, url = serve(model, masked=(8,))
    counted = {}
    with connect(url, privacy="masked-local") as session:
        hosted = session.model()
        for last in (9, SECRET, 9, 30):  # the first learns what is asked for together
            before = session.stats().exchanges
            hosted.generate(torch.tensor([[4, 8, last]]), max_new_tokens=6, do_sample=False)
            counted[last] = session.stats().exchanges - before
    assert counted[9] == counted[30] == 6 * counted[SECRET]
