# The loss of OpenAI's gpt2-xl (1558M parameters: 48 layers, 25 heads, 1600 wide) on OpenWebText, without training.

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # more batches than during training, for a more precise loss
batch_size = 8
wandb_log = False  # one evaluation has no curve
