"""The plugin in vLLM's words, in five rooms; outside, only `bench` and `tuner` import vLLM.

plugin/   how vLLM meets the plugin
    register            what the entry point does in every process of vLLM
    config              QoQConfig, the quantization method `qoq`
    front_end           what is refused before an engine starts, and who gets a stat logger
    refusal             the reason why an engine does not start, repeated where a person reads it
    load_check          the proof that a checkpoint filled the tensors that all sets share
    root                finds the model that a layer is being built for
    flex_models         FlexQuant* model classes for architectures with a loader of their own
    shared_files        files in shared memory, and who removes them
    step_counts         the step counters of an engine, for `vllm_qoq.step_counts`
    metrics             counters, load and KV cache in vLLM's log and Prometheus endpoint
    stat_logger_plugin  the entry point of `metrics`, in front ends of our models alone
methods/  the linear layers of a model
    routed_linear       a layer that holds several sets and computes with that of the step
    flex_op             `qoq::flex_linear`, the op in which the set is chosen
    weight_set          one set's weights of one layer, and the proof that they were loaded
    set_config          the config of one set, found as vLLM finds that of a checkpoint
    qoq_linear          the method of a QoQ set: 4-bit weights, int8 activations
    qoq_residual        the method of a nested set: int8 weights from two 4-bit planes
    int8_head           the lm_head in int8
    fusion              the compile pass that puts quantization into the kernel before it
    hidden_states       where hidden states leave a rotated model, and what is refused
    original_basis      the module that turns them into the original model's
    way_back            adds it to a model, for a pooler or a head that drafts
    draft_heads         turns what such a head takes from the model and shares with it
    after_loading       a method that vLLM calls once weights are loaded
routing/  the set of a step
    step                prefill or decode: reading vLLM's forward context
    policy              the routing in force in one engine
kv/       the quantized KV cache
    cache               turns it on, layer by layer
    backend             what the attention backends share
    cpu, cuda           the attention of each device
    prefill             prompts on a GPU: which part of their history is read when
    spec                how large the pages are
    key_bias            a warning of biases of K that the cache cannot hold
    refusals            what the cache does not serve
signals/  what the engine and its front end tell each other
    counters            steps by phase and set
    queue               calm or busy, from the length of the queue
    trace               routing decisions as lines of JSON

options          what users say in `--additional-config`
vllm_versions    what we take from vLLM beyond its public interface, and every version branch
"""
