-- Removes open deliveries of the subscription ARGV[4], at most ARGV[5] of them. Answers with how many went.

allow_when_full()
local sub, left, gone = call('HGET', P .. 'subs', ARGV[4]), tonumber(ARGV[5]), 0
if not sub then return 0 end
for _, kind in ipairs({ 'b:', 'q:', 'w:', 'l:' }) do
  local seqs = (left > gone) and call('ZRANGE', P .. kind .. sub, 0, left - gone - 1) or {}
  load_deliveries(sub, seqs)
  load_progress(seqs, sub)
  local events, facts = fetch(P .. 'ev', seqs), {}
  for i, seq in ipairs(seqs) do
    local d, event, p = deliveries[sub][seq], events[i] and read_event(events[i]), progress[seq]
    if d and event then
      local kept = {}
      for _, other in ipairs(subs_of(event)) do
        if other ~= sub then kept[#kept + 1] = pack('<I4', tonumber(other)) end
      end
      facts[#facts + 1] = seq
      facts[#facts + 1] = event_text(event.appended, event.created, event.kind, event.id, event.key, table.concat(kept))
      p[1] = p[1] - 1
      if d[STARTED] > 0 then p[2] = p[2] - 1 end
      remove_delivery(sub, seq, d)
      gone = gone + 1
    else
      call('ZREM', P .. kind .. sub, seq)
    end
  end
  many('HSET', P .. 'ev', facts)
end
store_removed()
finish(gone > 0)
return gone
