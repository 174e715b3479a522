"""The parts of the Envoy bootstrap, as envoy-data-plane's typed messages.

Importing any module here costs half a second and 60 MB (those messages are many); `extproc.envoy.bootstrap` is the door and imports late.
Every field used exists in envoy-data-plane 2.2.0, though it is older than Envoy 1.40: nothing is patched in afterwards.
"""
