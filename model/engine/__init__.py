"""The training of a partly frozen GPT-2: steps, kernels, cached trunk outputs, losses and checkpoints."""
