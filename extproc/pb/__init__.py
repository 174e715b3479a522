"""Protocol messages, compiled from protos/ by `python -m extproc.pb.build`; only `extproc.envoy.codec` imports them."""
