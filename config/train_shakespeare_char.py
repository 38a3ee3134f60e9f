# Tiny Shakespeare, character by character: a model small enough to train in minutes on one GPU.
# On a CPU add --device=cpu --compile=False and smaller sizes; README.md has the full command.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# the model soon overfits one million characters: evaluate every 250 steps, and save only if the val loss improves
eval_interval = 250
eval_iters = 200
always_save_checkpoint = False
log_interval = 10  # a line per step would hide the evaluations

# 10.6M parameters, a context of 256 characters; dropout, because there are many epochs
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1  # 16,384 characters per step fit in one pass

learning_rate = 1e-3  # small models need larger steps
min_lr = 1e-4  # a tenth of the peak
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000  # the decay ends with the run
beta2 = 0.99  # with few tokens per step the second moment is noisy: average it over more steps
