# Tiny Shakespeare, character by character: a model small enough to train in minutes on one GPU.
# On a CPU add --device=cpu --compile=False and turn the sizes down; README.md has the full command.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# one million characters are soon learned by heart: look at the val loss often, and keep only what improves it
eval_interval = 250
eval_iters = 200
always_save_checkpoint = False
log_interval = 10  # a line for every step would drown the evaluations

# 10.6M parameters, which see 256 characters at a time; dropout because there are many epochs
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1  # 16,384 characters a step fit in one pass

learning_rate = 1e-3  # small models take larger steps
min_lr = 1e-4  # a tenth of the peak
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000  # the decay ends with the run
beta2 = 0.99  # few tokens a step make a noisy second moment: average it over more steps
