# The loss of OpenAI's gpt2-large (774M parameters: 36 layers, 20 heads, 1280 wide) on OpenWebText, without training.

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # more batches than during training, for a more precise loss
batch_size = 8
wandb_log = False  # one evaluation has no curve
