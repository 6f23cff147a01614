"""What quantization changes in the next token: `vllm-qoq evaluate`.

windows    the pieces of the text, and which of their tokens are scored
scores     what is measured of every scored token, and means with their errors
float_model  the model that is compared with, in transformers
engine     the checkpoint, in vLLM
log        what the processes of engines print, held back where a run is quiet
job        a run: an engine a precision of the KV cache, all sets in each
report     the table
plot       the loss over the bytes
comparison  several checkpoints of one model on several texts, and comparison_plot
"""
