"""Peak memory and time of a head's training step:  python benchmarks/head_memory.py

A full head of SmolLM2's shape (d = 576, V = 49152) on 8 x 1024 hidden states in fp32: forward,
backward and AdamW, through lmsat's head and through Hugging Face's own causal-LM loss on
materialised logits. Each in a process of its own, so that neither inherits the other's memory;
the peak is above what the process held with weights and states, before its first step. Checked:
the same losses to 1e-5, step by step, and the same norm of the weights after the last.
"""

import json
import subprocess
import sys
import time

D, VOCABULARY, BATCH, SEQUENCE, STEPS = 576, 49152, 8, 1024, 3


def measure(which: str) -> None:
    import torch

    from trainables import heads, memory

    torch.manual_seed(0)
    torch.set_num_threads(2)
    head = heads.make({"kind": "linear", "rank": None}, VOCABULARY, D)
    hidden = torch.randn(BATCH, SEQUENCE, D)
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)
    cpu = torch.device("cpu")
    if which == "huggingface":
        from transformers.loss.loss_utils import ForCausalLMLoss

        def loss() -> torch.Tensor:
            return ForCausalLMLoss(head(hidden), None, VOCABULARY, shift_labels=labels)
    else:

        def loss() -> torch.Tensor:
            return head(hidden, labels)

    memory.peak(cpu)
    before = memory.peak(cpu)
    losses, times = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
        losses.append(value.item())
    found = {"peak": memory.peak(cpu) - before, "seconds": min(times), "losses": losses}
    found["weights"] = head.weight.detach().double().square().sum().item()
    print(json.dumps(found))


def main() -> None:
    found = {}
    for which in ("lmsat", "huggingface"):
        done = subprocess.run(
            [sys.executable, __file__, which], capture_output=True, text=True, check=True
        )
        found[which] = json.loads(done.stdout.splitlines()[-1])
        peak, seconds = found[which]["peak"], found[which]["seconds"]
        print(f"{which:12} peak {peak / 1e6:7.0f} MB   step {seconds:5.2f} s")
    one, other = found["lmsat"], found["huggingface"]
    for a, b in zip(one["losses"], other["losses"], strict=True):
        assert abs(a - b) < 1e-5, (a, b)
    assert abs(one["weights"] / other["weights"] - 1) < 1e-5
    print(
        f"Hugging Face over lmsat: memory {other['peak'] / one['peak']:.1f}, "
        f"time {other['seconds'] / one['seconds']:.2f}"
    )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
