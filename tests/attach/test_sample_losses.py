"""The grip around training_step: what it sees in a real fit, when it refuses, and that it goes away."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from patches import patched
from torch import nn
from torch.utils.data import DataLoader

from lightning_speedups.attach.sample_losses import LossGrip
from lightning_speedups.attach.trick import Trick
from lightning_speedups.tensors.sample_losses import mean_over_samples
from zoo import Classifier, loader, trainer


class Reader(Trick):
    def __init__(self, weights=None, samples=8):
        super().__init__()
        self.weights, self.samples, self.losses = weights, samples, []
        self.grips = (LossGrip(self),)

    def samples_in_step(self, trainer):
        return self.samples

    def weights_in_step(self, trainer):
        return self.weights

    def take_losses(self, trainer, losses):
        self.losses.append(losses)


class Own(Classifier):
    """A loss that torch does not compute."""

    def training_step(self, batch, batch_idx):
        logits = self.head(self.backbone(batch[0])).log_softmax(1)
        return self.reduce(-logits.gather(1, batch[1].unsqueeze(1)).squeeze(1))

    def reduce(self, losses):
        return losses.mean()


class Told(Own):
    def reduce(self, losses):
        return mean_over_samples(losses)


def test_it_sees_each_samples_loss_in_training_and_not_in_validation():
    reader, module = Reader(), Classifier()
    trainer(callbacks=[reader], max_epochs=2, num_sanity_val_steps=2).fit(module, loader(), loader())
    assert [tuple(losses.shape) for losses in reader.losses] == [(8,)] * 8
    assert [float(losses.mean()) for losses in reader.losses] == pytest.approx(module.losses, rel=1e-6)


def test_without_weights_the_weights_of_the_module_are_the_same_bits():
    modules = []
    for callbacks in ([], [Reader()]):
        torch.manual_seed(0)
        module = Classifier()
        trainer(callbacks=callbacks).fit(module, loader())
        modules.append(module)
    assert modules[0].losses == modules[1].losses
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))


def test_weights_reach_the_loss():
    weights, module = torch.tensor([8.0] + [0.0] * 7), Classifier()
    reader = Reader(weights)
    trainer(callbacks=[reader], max_epochs=1).fit(module, loader())
    assert module.losses == pytest.approx([float(losses[0]) for losses in reader.losses], rel=1e-6)


def test_it_refuses_a_step_in_which_it_sees_nothing_and_says_what_to_write():
    with pytest.raises(
        MisconfigurationException, match=r"Reader .* 8 samples in Own.training_step. .*mean_over_samples"
    ):
        trainer(callbacks=[Reader()]).fit(Own(), loader())


def test_what_it_says_to_write_helps():
    torch.manual_seed(0)
    plain, told, reader = Own(), Told(), Reader()
    told.load_state_dict(plain.state_dict())
    trainer().fit(plain, loader())
    trainer(callbacks=[reader]).fit(told, loader())
    assert len(reader.losses) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), told.parameters(), strict=True))


class Tagger(LightningModule):
    """Tags each of 3 tokens of a sample; `order` is that of the dimensions (samples, tokens) when they are flattened,
    and `anew` says whether the labels are then in the batch's memory no more."""

    def __init__(self, order=(0, 1), anew=False):
        super().__init__()
        self.net, self.order, self.anew = nn.Linear(2, 4), order, anew

    def training_step(self, batch, batch_idx):
        x, y = batch[0].flatten(1)[:, :6].view(-1, 3, 2), batch[1].unsqueeze(1).expand(-1, 3)
        scores, y = self.net(x).permute(*self.order, 2), y.permute(self.order)
        return F.cross_entropy(scores.reshape(-1, 4), (y + 0 if self.anew else y).reshape(-1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("weighs", [False, True])
def test_a_flattened_loss_is_read_but_of_a_batch_of_as_many_samples_as_tokens_that_shows_no_memory(anew, weighs):
    reader, module = Reader(), Tagger(anew=anew)
    reader.samples_in_step = lambda trainer: 8 if trainer.global_step < 2 else 3
    if weighs:
        reader.weights_in_step = lambda trainer: torch.full((reader.samples_in_step(trainer),), 2.0)
    says = pytest.warns(UserWarning, match="counts as it would in a full epoch") if weighs and anew else nullcontext()
    with says:
        trainer(callbacks=[reader], max_epochs=1).fit(module, data := loader(19))
    x, y = data.dataset.tensors
    scores = module.net(x.flatten(1)[:, :6].view(-1, 3, 2)).detach()
    own = F.cross_entropy(scores.mT, y.unsqueeze(1).expand(-1, 3), reduction="none").mean(1)
    torch.testing.assert_close(torch.cat(reader.losses), own[: 16 if anew else 19])


def test_a_loss_flattened_with_another_dimension_first_is_refused():
    for samples in (8, 3):  # as many as tokens
        with pytest.raises(
            MisconfigurationException, match=r"Give torch's loss the samples first and nothing flattened"
        ):
            trainer(callbacks=[Reader(samples=samples)]).fit(Tagger((1, 0)), loader(24, samples))


class Skips(Classifier):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 0 and len(self.seen) == 0:
            self.seen.append(None)
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_skips_its_batch_is_let_be():
    reader = Reader()
    trainer(callbacks=[reader], max_epochs=1).fit(Skips(), loader())
    assert len(reader.losses) == 3


class Changes(Told):
    def reduce(self, losses):
        return losses.mean() if self.trainer.global_step else mean_over_samples(losses)


def test_a_later_batch_without_losses_is_warned_of_where_weights_are_lost():
    with pytest.warns(UserWarning, match="counts as it would in a full epoch"):
        trainer(callbacks=[Reader(torch.ones(8))], max_epochs=1).fit(Changes(), loader())
    trainer(callbacks=[Reader()], max_epochs=1).fit(Changes(), loader())


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())


def test_manual_optimization_with_two_losses_a_step():
    reader, module = Reader(), Manual()
    trainer(callbacks=[reader], max_epochs=1).fit(module, loader())
    sums = [a + b for a, b in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert [float(losses.mean()) for losses in reader.losses] == pytest.approx(sums, rel=1e-6)


class ManualOwn(Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.head(self.backbone(batch[0])).sum())


def test_manual_optimization_that_shows_nothing_is_refused():
    with pytest.raises(MisconfigurationException, match="mean_over_samples"):
        trainer(callbacks=[Reader()], max_epochs=1).fit(ManualOwn(), loader())


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_accumulation_and_mixed_precision(arguments):
    reader, module = Reader(), Classifier()
    trainer(callbacks=[reader], max_epochs=1, **arguments).fit(module, loader())
    assert all(losses.dtype == torch.float32 for losses in reader.losses)
    assert [float(losses.mean()) for losses in reader.losses] == pytest.approx(module.losses, rel=1e-6)


def test_a_compiled_backbone():
    reader, module = Reader(), Classifier()
    module.backbone = torch.compile(module.backbone, backend="eager")
    trainer(callbacks=[reader], max_epochs=1).fit(module, loader())
    assert [float(losses.mean()) for losses in reader.losses] == pytest.approx(module.losses, rel=1e-6)


@pytest.mark.parametrize("failing", [False, True])
def test_it_goes_away(failing):
    module, one = Classifier(), trainer(callbacks=[Reader(samples=7 if failing else 8)])
    if failing:
        with pytest.raises(MisconfigurationException):
            one.fit(module, loader())
    else:
        one.fit(module, loader())
    assert not patched(one)


def test_two_that_read_are_refused():
    with pytest.raises(MisconfigurationException, match="Reader and Another both read"):
        trainer(callbacks=[Reader(), type("Another", (Reader,), {})()]).fit(Classifier(), loader())


def test_outside_a_fit_nothing_is_patched():
    one = trainer(callbacks=[Reader()])
    one.validate(Classifier(), loader(), verbose=False)
    assert not patched(one)


def test_a_loss_of_a_criterion_module():
    reader, module = Reader(), Classifier(nn.CrossEntropyLoss(label_smoothing=0.1))
    trainer(callbacks=[reader], max_epochs=1).fit(module, DataLoader(loader().dataset, batch_size=8))
    assert [float(losses.mean()) for losses in reader.losses] == pytest.approx(module.losses, rel=1e-6)
