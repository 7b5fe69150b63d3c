"""Networks written the way Hugging Face writes them, small, and a LightningModule around them: transformers itself is not needed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WORDS, SIZE = 24, 8


class Output(OrderedDict[str, Any]):
    """As a ModelOutput: a mapping with attributes, which torch takes for one piece."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Pieces:
    """As other libraries' outputs."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(hidden) @ self.key(hidden).mT / SIZE**0.5 + mask
        return self.dropout(scores.softmax(-1)) @ self.value(hidden)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.dense, self.output = Attention(), nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.dropout, self.LayerNorm = nn.Dropout(0.1), nn.LayerNorm(SIZE)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor]:
        hidden = hidden + self.attention(hidden, mask)
        return (self.LayerNorm(hidden + self.dropout(self.output(F.gelu(self.dense(hidden))))),)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(WORDS, SIZE, 0), nn.Embedding(16, SIZE)
        self.LayerNorm, self.dropout = nn.LayerNorm(SIZE), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(16)[None], persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = self.position_ids[:, : input_ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(places)))


class Encoder(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor]:
        for block in self.layer:
            hidden = block(hidden, mask)[0]
        return (hidden,)


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(SIZE, SIZE)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(hidden[:, 0]).tanh()


class BertLike(nn.Module):
    """Embeddings, blocks and a pooler; called by keywords alone."""

    base_model_prefix = "bert"

    def __init__(self, blocks: int = 3, output: Any = Output) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.pooler = Embeddings(), Encoder(blocks), Pooler()
        self.output = output

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        (hidden,) = self.encoder(self.embeddings(input_ids), (1.0 - mask[:, None].float()) * -1e9)
        return self.output(last_hidden_state=hidden, pooler_output=self.pooler(hidden))


class BertLikeForClassification(nn.Module):
    """Dropout and a classifier on what the pooler gives."""

    base_model_prefix = "bert"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bert, self.dropout, self.classifier = BertLike(**options), nn.Dropout(0.1), nn.Linear(SIZE, 2)

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
        pooled = self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits = self.classifier(self.dropout(pooled))
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


class TokenHead(nn.Module):
    """As a RoBERTa's: it takes what comes from all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.dense, self.out_proj = nn.Dropout(0.1), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.dense(self.dropout(hidden[:, 0])).tanh())


class RobertaLikeForClassification(BertLikeForClassification):
    """A head of several layers, two of them outside of `classifier`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pre_classifier, self.classifier = nn.Linear(SIZE, SIZE), TokenHead()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(self.pre_classifier(hidden))
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


class GptLike(nn.Module):
    """Embeddings beside each other, blocks, a norm, and a head that nothing but a method names."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.h, self.ln_f = nn.ModuleList(Block() for _ in range(blocks)), nn.LayerNorm(SIZE)
        self.wte, self.wpe = nn.Embedding(WORDS, SIZE), nn.Embedding(16, SIZE)
        self.projection = nn.Linear(SIZE, WORDS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
        length = input_ids.shape[1]
        hidden = self.wte(input_ids) + self.wpe.weight[:length]
        mask = torch.full((length, length), -1e9).triu(1)
        for block in self.h:
            (hidden,) = block(hidden, mask)
        logits = self.projection(self.ln_f(hidden))
        return Output(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()), logits=logits)


class Texts(Dataset[dict[str, Any]]):
    """Texts of two to nine words, as their numbers."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
        self.texts = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index], "labels": index % 2}


def padded(samples: list[dict[str, Any]], length: int = 0) -> dict[str, Tensor]:
    """A batch that is padded to its longest text, or to a length."""
    longest = max(length, *(len(sample["input_ids"]) for sample in samples))
    rows = torch.stack([F.pad(sample["input_ids"], (0, longest - len(sample["input_ids"]))) for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": rows, "attention_mask": (rows > 0).long(), "labels": labels}


def texts(count: int = 16, collate: Any = padded, seed: int = 5) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Texts(count), 4, shuffle=True, collate_fn=collate, generator=generator)


class Lit(LightningModule):
    """A network in one attribute; notes what trained in each epoch, and the rates of each step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network
        self.losses: list[float] = []
        self.trained: list[set[str]] = []
        self.rates: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # which a run that goes on within an epoch leaves out

    def on_train_epoch_start(self) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}

    def on_train_epoch_end(self) -> None:
        now = dict(self.net.named_parameters())
        self.trained.append({name for name, before in self.start.items() if not torch.equal(before, now[name])})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        optimizer.register_step_pre_hook(
            lambda *_: self.rates.append({names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})
        )
        return optimizer
