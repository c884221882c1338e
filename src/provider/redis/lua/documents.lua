-- Documents, as a part of the scripts that change them. A document stands in `c:<collection>` under its key, and its key
-- in `z:<collection>`, for the order of keys. `ttl` has those that expire.

local DOCUMENT = '<dd'

-- Value, revision and expiry (0 for never) of a live document.
local function read_document(collection, key)
  local text = call('HGET', P .. 'c:' .. collection, key)
  if not text then return nil end
  local revision, expires = unpack_from(DOCUMENT, text)
  if expires ~= 0 and expires <= now then return nil end
  return string.sub(text, 17), revision, expires
end

local function ttl_entry(collection, key)
  return pack('<I4', #collection) .. collection .. key
end

local function put_document(collection, key, value, expires)
  local revision = call('HINCRBY', meta, 'revision', 1)
  call('HSET', P .. 'c:' .. collection, key, pack(DOCUMENT, revision, expires) .. value)
  call('ZADD', P .. 'z:' .. collection, 0, key)
  if expires ~= 0 then
    call('ZADD', P .. 'ttl', int(expires), ttl_entry(collection, key))
  else
    call('ZREM', P .. 'ttl', ttl_entry(collection, key))
  end
  return revision
end

local function remove_document(collection, key)
  call('HDEL', P .. 'c:' .. collection, key)
  call('ZREM', P .. 'z:' .. collection, key)
  call('ZREM', P .. 'ttl', ttl_entry(collection, key))
end
