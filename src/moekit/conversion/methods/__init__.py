"""Ways to make a MoE of a dense model, one file each."""
