-- Removes some of what retention does not keep, and documents that have expired. ARGV[4] the instant before which finished
-- events go ('' for none), [5] how many events may stay ('' for any number), [6] the size of a step, [7] how many open
-- events stand at the beginning of those that are old. Answers with how many events went, how many open ones were passed
-- over, and 1 where there may be more to do.

allow_when_full()
local instant, most, step, skip = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local gone, pruned, is_more = 0, tonumber(call('HGET', meta, 'pruned') or 0), false

local expired = call('ZRANGEBYSCORE', P .. 'ttl', '-inf', int(now), 'LIMIT', 0, step)
for _, entry in ipairs(expired) do
  local size = unpack_from('<I4', entry)
  remove_document(string.sub(entry, 5, 4 + size), string.sub(entry, 5 + size))
end
is_more = #expired == step

local function remove(seq, event)
  remove_event(seq, event)
  drop(from_hashes, 'ids', event.id)
  pruned = math.max(pruned, tonumber(seq))
  gone = gone + 1
end

-- Removes those of these events that are finished, at most so many; calls `other` for the rest. Answers with how many it
-- looked at.
local function remove_finished(seqs, bound, other)
  if #seqs == 0 then return 0 end
  local events, open, upto = fetch(P .. 'ev', seqs), call('ZMSCORE', P .. 'open', unpack(seqs)), #seqs
  for i, text in ipairs(events) do
    events[i] = text and not open[i] and read_event(text)
  end
  load_events(seqs, events)
  for i, seq in ipairs(seqs) do
    if bound <= 0 then
      upto = i - 1
      break
    end
    if events[i] then
      remove(seq, events[i])
      bound = bound - 1
    elseif other then
      other(seq)
    end
  end
  store_removed()
  return upto
end

if instant ~= '' then
  local old = call('ZRANGEBYSCORE', P .. 'age', '-inf', '(' .. instant, 'LIMIT', skip, step)
  remove_finished(old, step, function() skip = skip + 1 end)
  local erased = call('ZRANGEBYSCORE', P .. 'erased', '-inf', '(' .. instant, 'LIMIT', 0, step)
  for i, id in ipairs(fetch(P .. 'erased-ids', erased)) do
    if id then call('HDEL', P .. 'ids', id) end
    call('HDEL', P .. 'erased-ids', erased[i])
    pruned = math.max(pruned, tonumber(erased[i]))
  end
  many('ZREM', P .. 'erased', erased)
  is_more = is_more or #old == step or #erased == step
end

-- Every event up to `swept` that is finished stands in `late`: it was open when the sweep came by.
local excess = most and call('HLEN', P .. 'ev') - most or 0
if excess > 0 then
  local bound = math.min(excess, step)
  local before = gone
  local late = call('ZRANGE', P .. 'late', 0, bound - 1)
  remove_finished(late, bound, function(seq) call('ZREM', P .. 'late', seq) end)
  bound = bound - (gone - before)
  local head, swept = tonumber(call('HGET', meta, 'head')), tonumber(call('HGET', meta, 'swept') or 0)
  if #late == 0 and swept < head then
    local last = math.min(head, swept + step)
    local seqs = {}
    for seq = swept + 1, last do
      seqs[#seqs + 1] = int(seq)
    end
    swept = swept + remove_finished(seqs, bound)
    call('HSET', meta, 'swept', int(swept))
  end
  is_more = is_more or (excess > gone - before and (#late > 0 or swept < head))
end

if gone > 0 or pruned > tonumber(call('HGET', meta, 'pruned') or 0) then call('HSET', meta, 'pruned', int(pruned)) end
finish()
return { gone, skip, is_more and 1 or 0 }
