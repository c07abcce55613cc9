"""Kinds made of other libraries: Hugging Face, torchvision, Lightning. Each imports its own when made."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import data

from corpus.bits import bits, problem, weights
from corpus.registry import ask, kind

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]
HUB = ("transformers",)
VISION = ("torchvision",)
LIGHTNING = ("lightning",)


# Hugging Face.


class Fed:
    """A model of `transformers`, whose output has the loss, with its optimiser."""

    def __init__(self, client_id: str) -> None:
        self.model: Any = self.make_model()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def make_model(self) -> Any:
        """Return a small BERT."""
        import transformers

        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        return transformers.BertForSequenceClassification(config)

    def inputs(self) -> dict[str, Tensor]:
        """Return a batch."""
        return {"input_ids": torch.randint(1, 30, (2, 6)), "labels": torch.tensor([0, 1])}

    def step(self) -> str:
        self.model.train()
        self.optimiser.zero_grad()
        loss = self.model(**self.inputs()).loss
        loss.backward()
        self.optimiser.step()
        return bits(loss, weights(self.model))


@kind(needs=HUB)
class HubBert(Fed):
    """`transformers`: a BERT classifier made of a config, with dropout and AdamW."""


@kind("step", "generate", "step", needs=HUB)
class HubGpt2(Fed):
    """`transformers`: GPT-2, trained, and sampled from by `generate()`."""

    def make_model(self) -> Any:
        import transformers

        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
            )
        )

    def inputs(self) -> dict[str, Tensor]:
        ids = torch.randint(1, 30, (2, 6))
        return {"input_ids": ids, "labels": ids}

    def generate(self) -> str:
        ids = torch.tensor([[3, 4]])
        mask = torch.ones_like(ids)
        drawn = self.model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=4, pad_token_id=0)
        return bits(drawn)


@kind(needs=HUB)
class HubVit(Fed):
    """`transformers`: a ViT image classifier."""

    def make_model(self) -> Any:
        import transformers

        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        )
        return transformers.ViTForImageClassification(config)

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}


@kind(needs=HUB, refused="'schedule'")
class HubSchedule(Fed):
    """`transformers.get_linear_schedule_with_warmup`, which keeps a function."""

    def __init__(self, client_id: str) -> None:
        import transformers

        super().__init__(client_id)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimiser, 2, 10)

    def step(self) -> str:
        result = super().step()
        self.schedule.step()
        return bits(result, self.schedule.get_last_lr())


@kind(needs=HUB)
class HubScheduleStateDict(HubSchedule):
    """The same schedule, in `state_dict()` and `load_state_dict()` of the learner."""

    def parts(self) -> list[Any]:
        return [self.model, self.optimiser, self.schedule]

    def state_dict(self) -> dict[str, Any]:
        return {str(number): part.state_dict() for number, part in enumerate(self.parts())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts()):
            part.load_state_dict(state[str(number)])


@kind(needs=HUB, refused="'model'")
class HubCheckpointing(Fed):
    """`gradient_checkpointing_enable()` of `transformers`, which hooks a function into the model."""

    def make_model(self) -> Any:
        model = super().make_model()
        model.gradient_checkpointing_enable()
        return model


@kind(needs=(*HUB, "accelerate"))
class HubTrainer(Fed):
    """A `transformers.Trainer` that is made in each call, and let go."""

    def step(self) -> str:
        import transformers

        rows = [{"input_ids": torch.randint(1, 30, (6,)), "labels": number % 2} for number in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, num_train_epochs=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
            )
            trainer = transformers.Trainer(self.model, arguments, train_dataset=rows)
            trainer.remove_callback(transformers.PrinterCallback)
            result = trainer.train()
        return bits(result.training_loss, weights(self.model))


@kind(needs=(*HUB, "accelerate"), refused="'arguments'")
class HubTrainingArguments:
    """`transformers.TrainingArguments` in an attribute."""

    def __init__(self, client_id: str) -> None:
        import transformers

        self.arguments = transformers.TrainingArguments("unused", use_cpu=True, report_to=[])

    def step(self) -> str:
        self.arguments.seed += 1
        return bits(self.arguments.seed)


class Text:
    """A tokenizer that gets a word with each call."""

    def __init__(self, client_id: str) -> None:
        self.count = 0
        self.tokenizer: Any = self.make_tokenizer()

    def make_tokenizer(self) -> Any:
        """Return a tokenizer."""

    def step(self) -> str:
        self.count += 1
        self.tokenizer.add_tokens([f"word{self.count}"])
        return bits(len(self.tokenizer), self.tokenizer("a b bc word1 word2 nothing")["input_ids"])


@kind(needs=HUB)
class HubTokenizer(Text):
    """`transformers`: a tokenizer in Python, of a vocabulary file."""

    def make_tokenizer(self) -> Any:
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "vocab.txt")
            path.write_text("\n".join(WORDS), encoding="utf-8")
            return BertTokenizerLegacy(str(path))


@kind(needs=HUB)
class HubFastTokenizer(Text):
    """`transformers`: a fast tokenizer, of `tokenizers`."""

    def make_tokenizer(self) -> Any:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordPiece(dict(zip(WORDS, range(8), strict=True)), unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
        )


@kind(needs=("datasets",), refused="'rows'")
class HubDataset:
    """A `datasets.Dataset` in an attribute."""

    def __init__(self, client_id: str) -> None:
        import datasets

        self.rows = datasets.Dataset.from_dict({"x": list(range(8)), "text": ["a b"] * 8})

    def step(self) -> str:
        return bits([row["x"] for row in self.rows.shuffle(seed=int(torch.randint(9, ())))])


@kind(needs=("datasets",))
class HubDatasetNotState(HubDataset):
    """A `datasets.Dataset` that `not_state` leaves out."""

    not_state = {"rows"}


# torchvision.


class Images:
    """An image data set; a call reads it through a loader."""

    def __init__(self, client_id: str) -> None:
        self.data: Any = self.make_data()
        self.loader = data.DataLoader(self.data, batch_size=3, shuffle=True)

    def make_data(self) -> Any:
        """Return the data set."""

    def step(self) -> str:
        return bits(*[(images, labels) for images, labels in self.loader])


@kind(*[ask("step")] * 2, needs=VISION)
class VisionResnet:
    """`torchvision`: `resnet18` with batch normalisation and momentum."""

    def __init__(self, client_id: str) -> None:
        self.model: Any = self.make_model()
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def make_model(self) -> Any:
        import torchvision

        return torchvision.models.resnet18(num_classes=3)

    def step(self) -> str:
        self.optimiser.zero_grad()
        loss = nn.functional.cross_entropy(self.model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
        loss.backward()
        self.optimiser.step()
        return bits(loss, weights(self.model))


@kind(needs=VISION)
class VisionTransformer(VisionResnet):
    """`torchvision`: a `VisionTransformer`, which keeps a `partial` of a layer's class."""

    def make_model(self) -> Any:
        import torchvision

        return torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16, num_classes=3)


@kind(needs=VISION)
class VisionFakeData(Images):
    """`torchvision`: `FakeData` with random transforms (v1)."""

    def make_data(self) -> Any:
        from torchvision import datasets, transforms

        steps = [
            transforms.RandomCrop(6),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
        return datasets.FakeData(6, (3, 8, 8), 3, transform=transforms.Compose(steps))


@kind(needs=VISION)
class VisionTransformsV2(Images):
    """`torchvision`: `FakeData` with random transforms (v2)."""

    def make_data(self) -> Any:
        from torchvision import datasets
        from torchvision.transforms import v2

        steps = [
            v2.RandomResizedCrop(6),
            v2.ColorJitter(0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
        return datasets.FakeData(6, (3, 8, 8), 3, transform=v2.Compose(steps))


@kind(needs=VISION, refused="'data'")
class VisionLambda(Images):
    """`torchvision`: a transform that is a lambda."""

    def make_data(self) -> Any:
        from torchvision import datasets

        return datasets.FakeData(6, (3, 8, 8), 3, transform=lambda image: torch.as_tensor(np.array(image)))


@kind(needs=VISION)
class VisionMnist(Images):
    """`torchvision`: `MNIST` read from local files."""

    def make_data(self) -> Any:
        from torchvision import datasets, transforms

        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "MNIST", "raw")
            raw.mkdir(parents=True)
            pixels = bytes(number % 251 for number in range(6 * 28 * 28))
            for part in ("train", "t10k"):
                (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 6, 28, 28) + pixels)
                (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 6) + bytes(range(6)))
            return datasets.MNIST(folder, transform=transforms.ToTensor())


class Folder(Images):
    """Pictures in a folder for each class."""

    def make_data(self) -> Any:
        from torchvision import datasets, transforms

        return datasets.ImageFolder(str(Path(__file__).with_name("pictures")), transforms.ToTensor())


@kind(needs=VISION, refused="'data'")
class VisionImageFolder(Folder):
    """`torchvision`: an `ImageFolder`, which keeps a function that opens files."""


@kind(needs=VISION)
class VisionImageFolderNotState(Folder):
    """`torchvision`: an `ImageFolder` and its loader that `not_state` leaves out."""

    not_state = {"data", "loader"}


@kind(needs=VISION)
class VisionTensor:
    """`torchvision`: an image of `tv_tensors`."""

    def __init__(self, client_id: str) -> None:
        from torchvision import tv_tensors

        self.image = tv_tensors.Image(torch.rand(3, 4, 4))

    def step(self) -> str:
        from torchvision.transforms import v2

        self.image = v2.functional.horizontal_flip(self.image)
        return bits(type(self.image).__name__, self.image)


# Lightning.


class Lit:
    """A LightningModule with its data."""

    def __init__(self, client_id: str) -> None:
        from corpus.lightning_module import Regression

        self.x, self.y = problem()
        self.model = Regression()


@kind(needs=LIGHTNING)
class LightningByHand(Lit):
    """A LightningModule that the learner trains itself."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.optimiser = self.model.configure_optimizers()

    def step(self) -> str:
        self.optimiser.zero_grad()
        loss = nn.functional.mse_loss(self.model.net(self.x), self.y)
        loss.backward()
        self.optimiser.step()
        return bits(loss, weights(self.model))


@kind(needs=LIGHTNING)
class LightningTrainer(Lit):
    """A LightningModule that a `lightning.Trainer` fits in each call, and that lets go of the trainer."""

    def step(self) -> str:
        from corpus.lightning_module import fit

        trainer = fit(self.model, self.x, self.y)
        self.model.trainer = None
        return bits(trainer.callback_metrics["loss"], weights(self.model))


@kind(needs=LIGHTNING, refused="'model'")
class LightningTrainerKept(Lit):
    """A LightningModule that keeps the `lightning.Trainer` that has fitted it."""

    def step(self) -> str:
        from corpus.lightning_module import fit

        fit(self.model, self.x, self.y)
        return bits(weights(self.model))


@kind(needs=LIGHTNING, refused="'accuracy'")
class LightningMetric:
    """A metric of `torchmetrics`, which keeps a function."""

    def __init__(self, client_id: str) -> None:
        import torchmetrics

        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def step(self) -> str:
        self.accuracy.update(torch.randint(3, (8,)), torch.randint(3, (8,)))
        return bits(self.accuracy.compute())


@kind(needs=LIGHTNING)
class LightningMetricStateDict(LightningMetric):
    """The same metric, whose sums are in `state_dict()` of the learner."""

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.accuracy.persistent(True)

    def state_dict(self) -> dict[str, Any]:
        return self.accuracy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy.load_state_dict(state)
