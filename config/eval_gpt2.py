# The loss of OpenAI's gpt2 (124M parameters: 12 layers, 12 heads, 768 wide) on OpenWebText, without training.

init_from = "gpt2"
eval_only = True
eval_iters = 500  # more batches than during training, for a more precise loss
batch_size = 8
wandb_log = False  # one evaluation has no curve
