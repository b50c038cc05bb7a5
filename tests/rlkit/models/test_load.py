"""Saving a model with an adapter leaves the trained one, and the memory of its device, alone."""

import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlkit.models.load import save_model


class RecordCopies(TorchDispatchMode):
    """Records the sizes of the tensors that are cloned on their own device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_save_model_merges_the_adapter_in_a_copy_on_the_cpu(tiny_model, tmp_path):
    """`to` copies weights from a GPU to the CPU; `deepcopy` alone would clone them on the GPU."""
    base = tiny_model("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    largest = max(weight.numel() for weight in model.parameters())
    with RecordCopies() as copies:
        save_model(model, None, tmp_path)
    assert all(size < largest for size in copies.sizes)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
