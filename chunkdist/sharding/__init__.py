"""What sharding engines need of a chunked model. One file an engine, chosen by what is found on the modules.

A group is one forward and one backward from outside, so DDP and ZeRO-1/2 need nothing. FSDP2 and ZeRO-3 put a
module's weights together around its call; a group of several layers runs inside the call of its last one.
"""
