"""A classifier of texts as projects around Hugging Face write it: dicts padded by the collate, outputs with a loss in them, a warm-up of its own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_speedups import ExactResume, FreezeBackboneFinetune, FusedOptimizer, LengthBatches, WarmupLRScaler

LOSS = "train_loss"
PAD = 0


@dataclass
class SequenceClassifierOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class BertLayer(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, 2, batch_first=True)
        self.intermediate, self.output = nn.Linear(hidden_size, 32), nn.Linear(32, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size)

    def forward(self, hidden, padding):
        attended, _ = self.attention(hidden, hidden, hidden, key_padding_mask=padding, need_weights=False)
        hidden = self.LayerNorm(hidden + attended)
        return hidden + self.output(F.gelu(self.intermediate(hidden)))


class BertModel(nn.Module):
    def __init__(self, vocab_size, hidden_size, layers):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(16, hidden_size)
        self.layer = nn.ModuleList(BertLayer(hidden_size) for _ in range(layers))

    def forward(self, input_ids, attention_mask):
        hidden = self.embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]
        for layer in self.layer:
            hidden = layer(hidden, attention_mask == 0)
        return hidden


class BertForSequenceClassification(nn.Module):
    def __init__(self, vocab_size=20, hidden_size=16, layers=2, num_labels=3):
        super().__init__()
        self.bert = BertModel(vocab_size, hidden_size, layers)
        self.dropout, self.classifier = nn.Dropout(0.1), nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden, mask = self.bert(input_ids, attention_mask), attention_mask.unsqueeze(-1)
        logits = self.classifier(self.dropout((hidden * mask).sum(1) / mask.sum(1)))
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def collate(features):
    ids = pad_sequence([feature["input_ids"] for feature in features], batch_first=True, padding_value=PAD)
    labels = torch.tensor([feature["labels"] for feature in features])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def linear_schedule_with_warmup(optimizer, num_warmup_steps, num_training_steps):
    def factor(step):
        left = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return step / max(1, num_warmup_steps) if step < num_warmup_steps else max(0.0, left)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def project(L):
    class GLUEDataModule(L.LightningDataModule):
        def __init__(self, train_batch_size=4):
            super().__init__()
            self.train_batch_size = train_batch_size

        def setup(self, stage):
            generator = torch.Generator().manual_seed(42)
            labels = [index % 3 for index in range(48)]
            lengths = torch.randint(3, 13, (48,), generator=generator).tolist()
            texts = [
                torch.randint(1 + 5 * label, 8 + 5 * label, (length,), generator=generator)
                for label, length in zip(labels, lengths, strict=True)
            ]
            rows = [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]
            self.dataset = {"train": rows[:40], "validation": rows[40:]}

        def train_dataloader(self):
            return DataLoader(self.dataset["train"], self.train_batch_size, shuffle=True, collate_fn=collate)

        def val_dataloader(self):
            return DataLoader(self.dataset["validation"], 8, collate_fn=collate)

    class GLUETransformer(L.LightningModule):
        def __init__(self, learning_rate=5e-3, adam_epsilon=1e-8, warmup_steps=2, weight_decay=0.01):
            super().__init__()
            self.save_hyperparameters()
            self.model = BertForSequenceClassification()
            self.outputs = []

        def forward(self, **inputs):
            return self.model(**inputs)

        def training_step(self, batch, batch_idx):
            outputs = self(**batch)
            loss = outputs.loss
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            outputs = self(**batch)
            self.outputs.append({"loss": outputs.loss, "right": outputs.logits.argmax(1) == batch["labels"]})

        def on_validation_epoch_end(self):
            self.log("val_loss", torch.stack([x["loss"] for x in self.outputs]).mean(), prog_bar=True, sync_dist=True)
            self.log("accuracy", torch.cat([x["right"] for x in self.outputs]).float().mean(), sync_dist=True)
            self.outputs.clear()

        def configure_optimizers(self):
            no_decay = ["bias", "LayerNorm.weight"]
            named = list(self.model.named_parameters())
            grouped = [
                {
                    "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
                    "weight_decay": self.hparams.weight_decay,
                },
                {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(grouped, lr=self.hparams.learning_rate, eps=self.hparams.adam_epsilon)
            scheduler = linear_schedule_with_warmup(
                optimizer, self.hparams.warmup_steps, self.trainer.estimated_stepping_batches
            )
            return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    tricks = [
        FreezeBackboneFinetune(None, unfreeze_at_epoch=1, backbone_lr_ratio=0.5),
        WarmupLRScaler(scale=2.0, warmup_epochs=1),
        LengthBatches(max_tokens=60),
        FusedOptimizer(),
        ExactResume(),
    ]
    return GLUETransformer(), GLUEDataModule(), tricks, {"max_epochs": 4, "gradient_clip_val": 1.0}
