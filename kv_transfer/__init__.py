"""How KV blocks get from one worker to another: layout, handshake, leases, handoffs, transports."""
