"""The language model that is compared, and its loaders, through a real Trainer."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from lightning_speedups.measure.language_model import LanguageModel, text_loaders
from lightning_speedups.measure.networks import Transformer
from lightning_speedups.measure.stopwatch import Stopwatch
from lightning_speedups.measure.text import library_text
from lightning_speedups.measure.training import seeded, train


@pytest.fixture(scope="module")
def data():
    return library_text(50, 30, context=16)


def module(seed=0, **options):
    with seeded(seed):
        return LanguageModel(Transformer(256, context=16, width=16, depth=2), **({"lr": 0.003} | options))


def fit(one, data, **options):
    given = {"batch_size": 16, "epochs": 2, "seed": 0, "trainer": {"accelerator": "cpu"}, "make_loaders": text_loaders}
    return train(one, data, **(given | options))


def test_points_hold_what_an_independent_evaluation_gives_and_count_tokens(data):
    counts, one = [], module()
    points = fit(one, data, watch=Stopwatch(counts.append))
    with torch.no_grad():
        logits = one.model(data.x_test)
    assert points[-1].test_loss == pytest.approx(float(F.cross_entropy(logits.mT, data.y_test)), rel=1e-4)
    assert points[-1].accuracy == pytest.approx(float((logits.argmax(2) == data.y_test).float().mean()), abs=1e-5)
    assert points[-1].test_loss < points[0].test_loss
    assert counts == 6 * [16 * 16]
    assert [point.samples for point in points] == [768, 1536]


def test_a_run_ends_where_adamw_by_hand_ends(data):
    one, by_hand = module(), module()
    fit(one, data, epochs=1)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), 0.003)
    order = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(range(50), 16, shuffle=True, drop_last=True, generator=order)
    for rows in loader:
        optimizer.zero_grad()
        F.cross_entropy(by_hand.model(data.x_train[rows]).view(-1, 256), data.y_train[rows].view(-1)).backward()
        optimizer.step()
    for a, b in zip(one.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_criterion_gets_a_row_for_each_token(data):
    shapes = []

    class Loss(torch.nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            shapes.append((tuple(logits.shape), tuple(targets.shape)))
            return super().forward(logits, targets)

    fit(module(criterion=Loss()), data, epochs=1)
    assert shapes == 3 * [((256, 256), (256,))]


def test_one_cycle_is_torchs_own_over_the_whole_run(data):
    rates = []

    class Watching(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module(one_cycle=True), data, callbacks=[Watching()])
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule, expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, 6), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 6:
            schedule.step()
    assert rates == pytest.approx(expected)


def test_the_order_of_the_batches_depends_on_the_seed_alone(data):
    first, again, other = (torch.cat([x for x, _ in text_loaders(data, 16, seed)[0]]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.cat([y for _, y in text_loaders(data, 16, 0)[1]]), data.y_test)


# ---- the network


def test_a_token_sees_what_came_before_and_nothing_else():
    network = Transformer(50, context=12, width=16, depth=2).eval()
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    with torch.no_grad():
        one, other, short = network(tokens), network(changed), network(tokens[:, :7])
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.isclose(one[:, 7:], other[:, 7:]).all(2).any()
    assert torch.allclose(one[:, :7], short, atol=1e-6)


def test_it_is_the_pre_norm_transformer_of_torch():
    network = Transformer(50, context=12, width=16, depth=1, heads=2)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
    block = network.blocks[0]
    with torch.no_grad():
        for norm in (block.first_norm, block.second_norm):
            norm.weight.uniform_(0.5, 1.5)
        pairs = (layer.self_attn.in_proj_weight, block.qkv), (layer.self_attn.out_proj.weight, block.proj)
        for weight, linear in (*pairs, (layer.linear1.weight, block.fc1), (layer.linear2.weight, block.fc2)):
            weight.copy_(linear.weight)
        layer.norm1.weight.copy_(block.first_norm.weight)
        layer.norm2.weight.copy_(block.second_norm.weight)
        tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
        x = network.embedding(tokens) + network.places.weight
        mask = torch.nn.Transformer.generate_square_subsequent_mask(12)
        expected = network.head(network.norm(layer(x, src_mask=mask, is_causal=True)))
        assert torch.allclose(network(tokens), expected, atol=1e-5)
