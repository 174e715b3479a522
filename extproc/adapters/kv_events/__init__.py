"""What engines tell of their KV caches, over ZMQ: vLLM's KV events, which SGLang sends in the same form.

publisher   one data-parallel rank of a replica, with sequence numbers of its own
message     one step of its engine: topic, sequence number, payload
event       blocks stored, blocks removed, all blocks cleared
replay      a publisher's last messages once more, for those who join late or missed some
whole       knowledge of a cache since it was last empty, without a gap

wire.py reads payloads, selection.py says which events count, position.py what a sequence number means (all pure); sources.py finds
publishers, sockets.py alone knows of ZMQ, follower.py follows one publisher, following.py all of them.
"""
