"""QLoRA with three clients: a small transformer in 4-bit codes, of which only adapters are trained and travel.

Needs transformers, peft and bitsandbytes; runs on a CPU in less than a minute, and downloads nothing.
"""

import hashlib
import tempfile

import peft
import torch
import transformers

import fed_learn as fl
from fed_learn.weights import WeightDict

ROUNDS, STEPS, SYMBOLS, LENGTH = 4, 20, 32, 16


def base_model(folder: str) -> torch.nn.Module:
    """The base as a hub would have it, read in 4-bit codes: the same for all."""
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map="cpu")


def save_base(folder: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def with_adapters(base: torch.nn.Module) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    # In eval mode bitsandbytes packs the codes anew on some processors, and rounds what belongs to them.
    return peft.get_peft_model(base, config).train()


def sequences(stride: int, count: int, seed: int) -> torch.Tensor:
    """Symbols that go on by a stride, each client's its own."""
    starts = torch.randint(SYMBOLS, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + stride * torch.arange(LENGTH)) % SYMBOLS


def digest(model: torch.nn.Module) -> str:
    """Of every byte of the model but its adapters."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


class Client(fl.Learner):
    """Trains the adapters of its own model on its own sequences."""

    validation_metric = "loss"

    def __init__(self, model: peft.PeftModel, stride: int) -> None:
        self.model, self.stride = model, stride

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> tuple[object, int]:
        fl.set_weights(self.model, weights, only="lora_")
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(STEPS):
            words = sequences(self.stride, 16, 1000 * ctx[fl.ContextKey.ROUND] + step)
            optimizer.zero_grad()
            self.model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
        return fl.get_weights(self.model, only="lora_"), 16 * STEPS

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
        fl.set_weights(self.model, weights, only="lora_")
        words = sequences(self.stride, 32, 999_999)
        with torch.no_grad():
            return {"loss": self.model(input_ids=words, labels=words).loss.item()}


with tempfile.TemporaryDirectory() as folder:
    save_base(folder)
    learners = [Client(with_adapters(base_model(folder)), stride) for stride in (1, 3, 5)]
models = [learner.model for learner in learners]
before = digest(models[0])
initial = fl.get_weights(models[0], only="lora_")
clients = [fl.FederatedClient(f"site-{i}", learner) for i, learner in enumerate(learners, 1)]
selection = fl.ModelSelectionHandler(validation_metric_name="initial_loss")
result = fl.FederatedServer(initial, num_rounds=ROUNDS, rule="lora", handlers=[selection]).run(clients)
losses = [report.metrics["selection"] for report in result.reports] + [result.metrics["selection"]]
for number, loss in enumerate(losses):
    print(f"after {number} rounds: loss {loss:.3f}")
if {digest(model) for model in models} != {before}:
    raise SystemExit("the base has changed")
sent = sum(array.nbytes for array in initial.values())
whole = sum(tensor.nbytes for tensor in models[0].state_dict().values())
print(f"the base is the same, byte for byte; a client sends {sent:,} of {whole:,} bytes")
