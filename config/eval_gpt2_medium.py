# The loss of OpenAI's gpt2-medium (350M parameters: 24 layers, 16 heads, 1024 wide) on OpenWebText, without training.

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # more batches than during training, for a more precise loss
batch_size = 8
wandb_log = False  # one evaluation has no curve
